"""ComposerBGEM3 against Hugging Face, NumPy, SciPy and the extracted model."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy, spearmanr
from torch import Tensor
from torch.nn import functional

from bge_pruning.model_io.checkpoint import cut
from bge_pruning.models import objective
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.embedding_heads import Outputs, Scores, compute_scores
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import PART_OUTPUTS, LossWeights, following_layers
from bge_pruning.models.structural_pruning import AXES, PruningMasks
from bge_pruning.models.teacher import HIDDEN, FrozenEncoder, compute_outputs

B, N, T, H = 6, 2, 8, 32
EVERY_LOSS = LossWeights(
    sts_regression=0.7,
    distillation_alignment=0.3,
    distillation_similarity=2.0,
    similarity_temperature=0.1,
)
Build = Callable[..., ComposerBGEM3]
THREE = LossWeights(distillation_sparse=0.5, distillation_colbert=2.0)
THREE_NAMES = ("token_weights", "colbert_vecs")
NAMES = ("dense", "sparse", "colbert")
WHOLE_BATCH = LossWeights(
    cosent=0.3,
    sts_regression=1.0,
    distillation_alignment=0.5,
    distillation_similarity=1.0,
    distillation_sparse=0.5,
    distillation_colbert=1.0,
    distillation_hidden=0.7,
    distillation_scores=0.6,
    teacher_scores_in_batch=True,
    contrastive=1.0,
    self_distillation=0.5,
    score_distillation=0.4,
    contrastive_outputs=NAMES,
    temperature=0.2,
    learn_temperature=True,
)
ALL_NAMES = ("dense_vecs", "token_weights", "colbert_vecs", "hidden_states")
DEEP = LossWeights(distillation_hidden=1.0)


@pytest.fixture(scope="module")
def pairs() -> dict[str, Tensor]:
    """Pairs of texts of 3 to 8 tokens with scores, two of them equal."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(4, 99, (B, N, T), generator=generator)
    lengths = torch.randint(3, T + 1, (B, N, 1), generator=generator)
    ids[..., 0] = 0
    ids = ids.scatter(2, lengths - 1, 2).masked_fill(torch.arange(T) >= lengths, 1)
    scores = torch.tensor([0.2, 0.9, 0.5, 0.5, 1.0, 0.0])
    return {"input_ids": ids, "attention_mask": ids.ne(1).long(), "scores": scores}


@pytest.fixture(scope="session")
def gates(tiny_shape, target_shape) -> Callable[[], L0Module]:
    """Fresh gates whose probabilities lie all over (0, 1)."""

    def build() -> L0Module:
        module = L0Module(tiny_shape, AXES, target_shape, init_mean=0.0, init_std=1.5, seed=2)
        module.warmup_progress = 0.5
        with torch.no_grad():
            for n, multiplier in enumerate([*module.lambda_1.values(), *module.lambda_2.values()]):
                multiplier.copy_(torch.linspace(-1, 1, multiplier.numel()) + n)
        return module

    return build


@pytest.fixture(scope="session")
def build(build_model, tiny_shape, gates) -> Build:

    def make(gated: bool = True, losses: LossWeights = EVERY_LOSS, **kwargs: Any) -> ComposerBGEM3:
        backbone, heads = build_model(tiny_shape, torch.float32, seed=1)
        return ComposerBGEM3(backbone, heads, gates() if gated else None, losses, **kwargs)

    return make


@pytest.fixture(scope="session")
def teacher_parts(build_model, tiny_shape):
    """Another model; with dropout, which a teacher must not use."""
    return build_model(tiny_shape, torch.float32, seed=5, dropout=0.4)


@pytest.fixture
def teacher(teacher_parts) -> FrozenEncoder:
    backbone, heads = copy.deepcopy(teacher_parts)
    return FrozenEncoder(backbone.train(), heads)


@pytest.fixture(scope="module")
def with_targets(pairs, teacher_parts, tiny_hf_config) -> dict[str, Tensor]:
    """The pairs with the teacher's vectors, as Hugging Face computes them."""
    vectors = hugging_face_vectors(teacher_parts[0], tiny_hf_config, pairs)
    return {**pairs, "teacher_dense_vecs": vectors}


def hugging_face_vectors(
    backbone: XLMRobertaBackbone, config: dict[str, Any], batch: dict[str, Tensor]
) -> Tensor:
    """CLS vectors of length 1, shape (B, N, H)."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    model = XLMRobertaModel(XLMRobertaConfig(**config)).eval()
    model.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        hidden = model(batch["input_ids"].view(-1, T), batch["attention_mask"].view(-1, T))
    return functional.normalize(hidden.last_hidden_state[:, 0], dim=-1).view(B, N, -1)


def masked_vectors(model: ComposerBGEM3, batch: dict[str, Tensor], masks: PruningMasks) -> Tensor:
    """Vectors of the backbone alone, one text at a time and without padding."""
    vectors = []
    for ids in batch["input_ids"].view(-1, T):
        ids = ids[ids != 1][None]
        hidden = model.backbone(ids, torch.ones_like(ids), masks)
        vectors.append(hidden[0, 0] / hidden[0, 0].norm())
    return torch.stack(vectors).view(B, N, -1)


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_without_gates_vectors_are_hugging_faces(training, build, pairs, tiny_hf_config):
    model = build(gated=False).train(training)
    vectors = model(pairs)["dense_vecs"]
    assert vectors.shape == (B, N, H)
    close(vectors, hugging_face_vectors(model.backbone, tiny_hf_config, pairs))


def test_training_samples_the_gates_of_the_step(build, pairs):
    model = build().train()
    seen = []
    for step in (3, 3, 4):
        model.l0_module.step = step
        masks = model.l0_module.sample_masks()
        seen.append(model(pairs)["dense_vecs"])
        assert not masks.is_binary()
        close(seen[-1], masked_vectors(model, pairs, masks))
    assert torch.equal(seen[0], seen[1])
    assert (seen[0] - seen[2]).abs().max() > 0.01


@pytest.mark.parametrize("at_target", [True, False])
def test_evaluation_uses_deterministic_gates(at_target, build, pairs):
    model = build(eval_target_model=at_target).eval()
    masks = model.l0_module.deterministic_masks(at_target=at_target)
    other = model.l0_module.deterministic_masks(at_target=not at_target)
    first = model(pairs)["dense_vecs"]
    model.l0_module.step += 1
    assert torch.equal(model(pairs)["dense_vecs"], first)
    close(first, masked_vectors(model, pairs, masks))
    assert (first - masked_vectors(model, pairs, other)).abs().max() > 0.01


def test_cosines_in_evaluation_are_those_of_the_extracted_model(build, pairs):
    model = build().eval()
    backbone, heads = copy.deepcopy((model.backbone, model.heads))
    keep = backbone.keep_indices(model.l0_module.deterministic_masks())
    cut(backbone, heads, keep)
    with torch.no_grad():
        cosines = model.eval_forward(pairs)
        assert torch.equal(model.eval_forward({}, model(pairs)), cosines)
        hidden = backbone(pairs["input_ids"].view(-1, T), pairs["attention_mask"].view(-1, T))
    first, second = hidden[:, 0].view(B, N, -1).unbind(1)
    assert hidden.shape[-1] == 16 and cosines.shape == (B,)
    close(cosines, functional.cosine_similarity(first, second, dim=-1))


def numpy_losses(vectors: Tensor, batch: dict[str, Tensor], temperature: float) -> dict[str, float]:
    """The parts of the loss, in float64, a text or pair at a time."""
    pairs, scores = vectors.detach().double().numpy(), batch["scores"].double().numpy()
    regression = np.mean([(a @ b - s) ** 2 for (a, b), s in zip(pairs, scores, strict=True)])
    student = pairs.reshape(B * N, -1)
    teacher = batch["teacher_dense_vecs"].double().numpy().reshape(B * N, -1)
    divergences = []
    for i in range(B * N):
        others = np.arange(B * N) != i
        p, q = (softmax(v[others] @ v[i] / temperature) for v in (teacher, student))
        divergences.append(entropy(p, q))
    return {
        "sts_regression": float(regression),
        "distillation_alignment": float(1.0 - (student * teacher).sum(-1).mean()),
        "distillation_similarity": float(np.mean(divergences)),
    }


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "losses",
    [
        LossWeights(sts_regression=2.0),
        LossWeights(distillation_alignment=0.5),
        LossWeights(distillation_similarity=3.0, similarity_temperature=0.2),
        EVERY_LOSS,
    ],
    ids=["sts", "alignment", "similarity", "all"],
)
def test_parts_of_the_loss_and_their_weighted_total(losses, gated, build, with_targets):
    model = build(gated, losses).train()
    outputs = model(with_targets)
    loss = model.loss(outputs, with_targets)
    every = numpy_losses(outputs["dense_vecs"], with_targets, losses.similarity_temperature)
    # A part of weight 0 is not computed.
    expected = {name: value for name, value in every.items() if getattr(losses, name)}
    total = sum(getattr(losses, name) * value for name, value in expected.items())
    if gated:
        expected["lagrangian"] = float(model.l0_module.lagrangian().detach())
        assert abs(expected["lagrangian"]) > 0.1
        total += expected["lagrangian"]
    expected["total"] = total
    assert {k: float(v) for k, v in loss.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert list(loss)[-1] == "total"


def test_parts_that_do_not_apply_are_left_out(build, pairs, with_targets):
    batch = {key: value for key, value in with_targets.items() if key != "scores"}
    model = build(gated=False).train()
    loss = model.loss(model(batch), batch)
    assert set(loss) == {"distillation_alignment", "distillation_similarity", "total"}
    model = build(losses=LossWeights(sts_regression=1.0))
    assert set(model.loss(model(pairs), pairs)) == {"sts_regression", "lagrangian", "total"}
    with pytest.raises(ValueError, match=r"no part of the loss applies.*To fix"):
        model.loss(model(batch), batch)


def test_gradients_reach_encoder_and_gates_but_not_the_heads(build, with_targets):
    model = build().train()
    for model.l0_module.step in range(40):  # a gate sampled at 0 or 1 has no gradient then
        model.loss(model(with_targets), with_targets)["total"].backward()
    for name, parameter in model.named_parameters():
        unused = name.startswith(("heads.", "backbone.pooler."))
        assert parameter.requires_grad is not unused, name
        if unused:
            assert parameter.grad is None, name
        elif "attention.self.key.bias" not in name:  # it cancels in the softmax
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_a_teacher_equals_cached_vectors_which_are_used_if_there(
    build, teacher, pairs, with_targets
):
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("the teacher was asked")

    model, cached = build(teacher=teacher).train(), build(teacher=refuse).train()
    outputs = model(pairs)
    live, other = model.loss(outputs, pairs), cached.loss(outputs, with_targets)
    assert {k: float(v) for k, v in live.items()} == pytest.approx(
        {k: float(v) for k, v in other.items()}, abs=1e-5
    )


def test_teacher_is_frozen_and_no_part_of_the_model(build, teacher, pairs):
    before = copy.deepcopy(teacher.backbone.state_dict())
    model = build(teacher=teacher).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.loss(model(pairs), pairs)["total"].backward()
    optimizer.step()
    assert not any(module.training for module in teacher.backbone.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.backbone.parameters())
    ids, mask = pairs["input_ids"][:, 0], pairs["attention_mask"][:, 0]
    assert not teacher(ids, mask)["dense_vecs"].requires_grad
    assert all(torch.equal(v, before[k]) for k, v in teacher.backbone.state_dict().items())
    model = build(teacher=teacher, teacher_dimensions=torch.arange(H))
    alone = build()
    # Neither trained, nor in checkpoints, nor moved, nor wrapped.
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in alone.named_parameters()]
    assert list(model.state_dict()) == list(alone.state_dict())
    assert {n.split(".")[0] for n in model.state_dict()} == {"backbone", "heads", "l0_module"}
    assert teacher.backbone not in set(model.modules())


def test_an_extracted_student_has_the_masked_loss(
    build, build_model, tiny_shape, gates, with_targets
):
    """Its vectors are compared in the teacher's space, where removed dimensions are 0."""
    backbone, heads = build_model(tiny_shape, torch.float32, seed=1)
    masks = gates().deterministic_masks()
    keep = backbone.keep_indices(masks)
    cut(backbone, heads, keep)
    dimensions = torch.tensor(keep.hidden)
    small = ComposerBGEM3(backbone, heads, None, EVERY_LOSS, teacher_dimensions=dimensions)
    vectors = masked_vectors(build(gated=False), with_targets, masks)
    assert small(with_targets)["dense_vecs"].shape == (B, N, 16)
    ours = small.loss(small(with_targets), with_targets)
    expected = numpy_losses(vectors, with_targets, EVERY_LOSS.similarity_temperature)
    found = {name: float(value) for name, value in ours.items() if name != "total"}
    assert found == pytest.approx(expected, abs=1e-5)
    # The dimensions are needed and move with the model, but are not saved.
    assert "teacher_dimensions" not in small.state_dict()
    assert copy.deepcopy(small).to("meta").teacher_dimensions.device.type == "meta"
    small.teacher_dimensions = None
    with pytest.raises(RuntimeError, match="size"):
        small.loss(small(with_targets), with_targets)


def spearman_of(model: ComposerBGEM3, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    metric = model.get_metrics(is_train=False)["cosine_spearman"]
    for outputs, scores in batches:
        model.update_metric({"scores": scores}, outputs, metric)
    return metric.compute()


@pytest.mark.parametrize("sizes", [(12,), (5, 5, 2), (1,) * 12])
def test_metric_is_the_rank_correlation_of_the_whole_split(sizes, build):
    generator = torch.Generator().manual_seed(6)
    outputs = torch.rand(12, generator=generator)
    outputs[3] = outputs[7]
    scores = torch.randint(0, 6, (12,), generator=generator) / 5
    found = spearman_of(build(), [*zip(outputs.split(sizes), scores.split(sizes), strict=True)])
    assert float(found) == pytest.approx(spearmanr(outputs, scores).statistic, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_metric_takes_the_types_that_batches_have(dtype, build):
    # More pairs than bfloat16 can count: ranks of its type would be rounded.
    generator = torch.Generator().manual_seed(6)
    scores = torch.randint(0, 6, (700,), generator=generator)
    outputs = (scores + 2 * torch.rand(700, generator=generator)).to(dtype)
    expected = spearmanr(outputs.double(), scores).statistic
    assert float(spearman_of(build(), [(outputs, scores)])) == pytest.approx(expected, abs=1e-5)


def test_every_evaluation_starts_anew_and_a_broken_model_gets_no_score(build):
    model = build()
    assert model.get_metrics(is_train=True) == {}
    assert list(model.get_metrics(is_train=False)) == ["cosine_spearman"]
    spearman_of(model, [(torch.arange(4.0), torch.arange(4.0))])
    opposite = spearman_of(model, [(torch.arange(4.0), -torch.arange(4.0))])
    assert float(opposite) == pytest.approx(-1.0)
    # Ranked as it comes, NaN follows the order of the split: sorted by score, it would be perfect.
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"5 of 5.*not finite.*To fix"):
            spearman_of(model, [(torch.full((5,), broken), torch.arange(5.0))])


@pytest.fixture
def three_teacher(teacher_parts) -> FrozenEncoder:
    return FrozenEncoder(*copy.deepcopy(teacher_parts), THREE_NAMES)


def test_token_losses_are_their_formulas(build, pairs, three_teacher):
    special = (0, 1, 2)
    model = build(gated=False, losses=THREE, teacher=three_teacher, special_ids=special).train()
    parts = model.loss(model(pairs), pairs)
    ids, mask = pairs["input_ids"].flatten(0, 1), pairs["attention_mask"].flatten(0, 1)
    with torch.no_grad():
        student = model.heads.outputs(model.backbone(ids, mask), mask, THREE_NAMES)
        target = three_teacher(ids, mask)
    sparse, colbert = [], []
    for row, real in enumerate(mask.bool()):
        words = [t for t in range(T) if real[t] and int(ids[row, t]) not in special]
        ours, theirs = (found["token_weights"][row, words].double() for found in (student, target))
        sparse.append(float((ours - theirs).square().sum() / max(theirs.square().sum(), 0.01)))
        vectors = [found["colbert_vecs"][row, real[1:]].double() for found in (student, target)]
        colbert.append(float(1 - (vectors[0] * vectors[1]).sum(-1).mean()))
    expected = {
        "distillation_sparse": sum(sparse) / len(sparse),
        "distillation_colbert": sum(colbert) / len(colbert),
    }
    expected["total"] = sum(getattr(THREE, name) * value for name, value in expected.items())
    assert {k: float(v.detach()) for k, v in parts.items()} == pytest.approx(expected, rel=1e-4)


def test_heads_are_trained_if_their_output_is(build, pairs, three_teacher):
    model = build(gated=False, losses=THREE, teacher=three_teacher).train()
    torch.nn.init.constant_(model.heads.sparse_linear.bias, 3.0)  # no dead ReLU
    model.loss(model(pairs), pairs)["total"].backward()
    for head in (model.heads.sparse_linear, model.heads.colbert_linear):
        assert head.weight.grad.abs().sum() > 0
    only = build(gated=False, losses=LossWeights(distillation_sparse=1.0), teacher=three_teacher)
    assert only.heads.sparse_linear.weight.requires_grad
    assert not only.heads.colbert_linear.weight.requires_grad
    assert set(model.eval()(pairs)) == {"dense_vecs"}
    alone = build(gated=False, losses=THREE).train()
    with pytest.raises(ValueError, match=r"no token_weights, colbert_vecs of the teacher.*To fix"):
        alone.loss(alone(pairs), pairs)


@pytest.mark.parametrize("head", ["sparse", "colbert"])
def test_an_output_without_a_head_is_refused(head, build_model, tiny_shape):
    change = {"sparse": {"sparse_head": False}, "colbert": {"colbert_dim": 0}}[head]
    backbone, heads = build_model(replace(tiny_shape, **change), torch.float32)
    name = {"sparse": "token_weights", "colbert": "colbert_vecs"}[head]
    with pytest.raises(ValueError, match=rf"trains {name}, and the model has no head.*To fix"):
        ComposerBGEM3(backbone, heads, None, THREE)
    with pytest.raises(ValueError, match=rf"teacher has no {name} to distil from.*To fix"):
        FrozenEncoder(backbone, heads, THREE_NAMES)


@pytest.fixture
def passages(pairs) -> dict[str, Tensor]:
    """The first text of an example is a query; the first two examples share a passage."""
    numbers = 10 + torch.arange(B)[:, None].repeat(1, N - 1)
    numbers[1] = numbers[0]
    known = torch.full((B, 2), -1)
    known[:, 0] = numbers[:, 0]
    batch = {key: value for key, value in pairs.items() if key != "scores"}
    return {**batch, "passage_texts": numbers, "positive_texts": known}


def test_contrastive_loss_is_bge_m3s(build, passages):
    losses = LossWeights(contrastive=1.0, contrastive_outputs=NAMES, temperature=0.2)
    model = build(gated=False, losses=losses, special_ids=(0, 1, 2)).train()
    loss = model.loss(model(passages), passages)["contrastive"]
    ids, mask = passages["input_ids"], passages["attention_mask"]
    with torch.no_grad():
        flat_ids, flat_mask = ids.flatten(0, 1), mask.flatten(0, 1)
        outputs = model.heads.outputs(model.backbone(flat_ids, flat_mask), flat_mask)

    def select(rows: list[int]) -> Outputs:
        kept = {name: value[rows] for name, value in outputs.items()}
        return Outputs(flat_ids[rows], flat_mask[rows], **kept)

    others = select([i * N + j for i in range(B) for j in range(1, N)])
    scores = compute_scores(select([i * N for i in range(B)]), others, (0, 1, 2)).all()
    numbers = passages["passage_texts"].flatten().tolist()
    total = {}
    for name, score in scores.items():
        rows = []
        for query in range(B):
            target = query * (N - 1)
            kept = [c for c, n in enumerate(numbers) if c == target or n != numbers[target]]
            logits = score[query, kept] / 0.2
            rows.append(torch.logsumexp(logits, 0) - logits[kept.index(target)])
        total[name] = float(torch.stack(rows).mean())
    expected = (total["dense"] + total["ensemble"] + 0.1 * total["sparse"] + total["colbert"]) / 4
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_outputs_that_are_named_are_compared_and_taught_by_the_ensemble(build, passages):
    values = []
    for names in (("dense",), ("dense", "colbert")):
        losses = LossWeights(contrastive=1.0, contrastive_outputs=names, temperature=0.2)
        model = build(gated=False, losses=losses).train()
        outputs = model(passages)
        assert set(outputs) == {f"{name}_vecs" for name in names}
        values.append(float(model.loss(outputs, passages)["contrastive"].detach()))
    assert values[0] != pytest.approx(values[1])
    losses = LossWeights(self_distillation=1.0, contrastive_outputs=NAMES, temperature=0.2)
    model = build(gated=False, losses=losses).train()
    parts = model.loss(model(passages), passages)
    assert set(parts) == {"self_distillation", "total"}
    assert float(parts["self_distillation"]) > 0
    parts["total"].backward()
    assert model.heads.colbert_linear.weight.grad.abs().sum() > 0


@pytest.fixture
def scored_passages(passages) -> dict[str, Tensor]:
    """Three passages for each query, with a teacher's scores; the passages are the pairs' texts."""
    ids, mask = passages["input_ids"], passages["attention_mask"]
    ids, mask = (torch.cat([v, v.roll(1, 0)[:, :1], v.roll(2, 0)], 1)[:, :4] for v in (ids, mask))
    numbers = 10 + torch.arange(B * 3).view(B, 3)
    scores = torch.linspace(-2, 3, B * 3).view(B, 3).sin() * 3
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "passage_texts": numbers,
        "positive_texts": numbers[:, :1],
        "passage_scores": scores,
        "source": "a name",
    }


def test_only_a_querys_own_passages_are_compared_where_the_source_says_so(build, scored_passages):
    batch = {**scored_passages, "own_passages_only": torch.ones(B, dtype=torch.bool)}
    losses = LossWeights(contrastive=1.0, contrastive_outputs=("dense",), temperature=0.2)
    model = build(gated=False, losses=losses).train()
    outputs = model(batch)
    vectors = outputs["dense_vecs"]  # (B, 4, H)
    logits = (vectors[:, :1] * vectors[:, 1:]).sum(-1) / 0.2
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(B, dtype=torch.long))
    found = model.loss(outputs, batch)["contrastive"]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    with_others = model.loss(outputs, scored_passages)["contrastive"]
    assert float(with_others.detach()) > float(found.detach())


def test_scores_of_a_file_teach_every_output(build, scored_passages):
    losses = LossWeights(score_distillation=1.0, contrastive_outputs=NAMES, temperature=0.2)
    model = build(gated=False, losses=losses, special_ids=(0, 1, 2)).train()
    outputs = model(scored_passages)
    parts = model.loss(outputs, scored_passages)
    assert set(parts) == {"score_distillation", "total"}
    total = dict.fromkeys((*NAMES, "ensemble"), 0.0)
    for row in range(B):

        def texts(which: slice, row: int = row) -> Outputs:
            named = {name: value[row, which] for name, value in outputs.items()}
            ids, mask = scored_passages["input_ids"], scored_passages["attention_mask"]
            return Outputs(ids[row, which], mask[row, which], **named)

        scores = compute_scores(texts(slice(0, 1)), texts(slice(1, None)), (0, 1, 2)).all()
        target = softmax(scored_passages["passage_scores"][row].double().numpy())
        for name, score in scores.items():
            found = softmax(score[0].detach().double().numpy() / 0.2)
            total[name] += entropy(target, found) / B
    expected = (total["dense"] + total["ensemble"] + 0.1 * total["sparse"] + total["colbert"]) / 4
    assert float(parts["score_distillation"].detach()) == pytest.approx(expected, rel=1e-4)


def texts_of(
    outputs: dict[str, Tensor], batch: dict[str, Tensor], rows: slice, texts: slice
) -> Outputs:
    """Some texts of some examples, one after the other."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")} | outputs
    return Outputs(**{name: value[rows, texts].flatten(0, 1) for name, value in given.items()})


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("names", [("dense",), NAMES])
@pytest.mark.parametrize("in_batch", [False, True])
def test_scores_of_the_teacher_teach_every_output(
    in_batch, names, cached, build, teacher_parts, scored_passages
):
    """In double precision from single scores, a query at a time; with the gradient of a cosine."""
    temperature, special = 0.7, (0, 1, 2)
    options = {"teacher_scores_in_batch": in_batch, "teacher_score_temperature": temperature}
    weights = LossWeights(distillation_scores=1.0, contrastive_outputs=names, **options)
    teacher = FrozenEncoder(*copy.deepcopy(teacher_parts), weights.distilled)
    ids, mask = (scored_passages[n].flatten(0, 1) for n in ("input_ids", "attention_mask"))
    taught = {name: value.unflatten(0, (B, 4)) for name, value in teacher(ids, mask).items()}
    batch = {k: v for k, v in scored_passages.items() if k != "passage_scores"}
    batch |= {f"teacher_{name}": value for name, value in taught.items()} if cached else {}
    given = None if cached else teacher
    model = build(gated=False, losses=weights, teacher=given, special_ids=special).train()
    outputs = model(batch)
    vectors = outputs["dense_vecs"]
    vectors.retain_grad()
    parts = model.loss(outputs, batch)
    assert set(parts) == {"distillation_scores", "total"}
    parts["total"].backward()

    total, gradient = dict.fromkeys(names, 0.0), torch.zeros_like(vectors, dtype=torch.float64)
    with torch.no_grad():
        for row in range(B):
            own = slice(row, row + 1)
            others = slice(None) if in_batch else own
            ours, theirs = (
                compute_scores(
                    texts_of(values, batch, own, slice(0, 1)),
                    texts_of(values, batch, others, slice(1, None)),
                    special,
                ).all()
                for values in (outputs, taught)
            )
            for name in ours:
                target = theirs[name][0].double().numpy()
                softness = temperature * max(target.std(), 0.01)
                found = softmax(ours[name][0].double().numpy() / softness)
                target = softmax(target / softness)
                total[name] = total.get(name, 0.0) + entropy(target, found) / B
                if len(names) == 1:
                    by_score = torch.from_numpy(found - target) / softness / B  # (passages,)
                    passages = vectors[others, 1:].flatten(0, 1).double()
                    gradient[row, 0] += by_score @ passages
                    share = by_score[:, None] * vectors[row, 0].double()
                    gradient[others, 1:] += share.view(-1, 3, H)
    if len(names) == 1:
        expected = total["dense"]
        assert (vectors.grad - gradient).norm() < 1e-3 * gradient.norm()  # scores are float32
    else:
        weighted = total["dense"] + total["ensemble"] + 0.1 * total["sparse"] + total["colbert"]
        expected = weighted / 4
    assert expected > 0.01
    assert float(parts["total"].detach()) == pytest.approx(expected, rel=1e-4)


def test_a_single_passage_is_not_compared_and_the_teacher_is_not_corrected(
    build, teacher_parts, passages
):
    """The teacher's own outputs have no loss; of one passage a query there is nothing to learn."""
    losses = LossWeights(distillation_scores=1.0, distillation_alignment=1.0)
    teacher = FrozenEncoder(*copy.deepcopy(teacher_parts), losses.distilled)
    model = build(gated=False, losses=losses, teacher=teacher).train()
    assert set(model.loss(model(passages), passages)) == {"distillation_alignment", "total"}
    same = replace(losses, teacher_scores_in_batch=True)
    model = ComposerBGEM3(*copy.deepcopy(teacher_parts), None, same, teacher).eval()
    outputs = model._embed(passages, None, same.trained)
    assert float(model.loss(outputs, passages)["distillation_scores"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("part", ["contrastive", "score_distillation"])
def test_queries_are_cut_and_scores_of_a_file_need_no_other_passages(
    part, build, scored_passages, monkeypatch
):
    """The longest query has 4 tokens, the longest passage 8."""
    mask = scored_passages["attention_mask"].clone()
    mask[:, 0, 4:] = 0
    sizes, compute = [], objective.compute_scores

    def record(queries: Outputs, passages: Outputs, special: Sequence[int]) -> Scores:
        sizes.append([tuple(side.colbert_vecs.shape[:2]) for side in (queries, passages)])
        return compute(queries, passages, special)

    monkeypatch.setattr(objective, "compute_scores", record)
    if part == "score_distillation":
        monkeypatch.setattr(objective, "gather_texts", None)
    losses = LossWeights(**{part: 1.0}, contrastive_outputs=NAMES)
    model = build(gated=False, losses=losses).train()
    batch = scored_passages | {"attention_mask": mask}
    model.loss(model(batch), batch)["total"].backward()
    every, own = [[(B, 3), (3 * B, T - 1)]], [[(1, 3), (3, T - 1)]] * B
    assert sizes == (every if part == "contrastive" else own)


@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16_products_on_a_cpu(gated, build, with_targets):
    exact, mixed = build(gated=gated), build(gated=gated, cpu_dtype=torch.bfloat16)
    dtypes = []
    layer = mixed.backbone.encoder.layer[0].intermediate.dense
    layer.register_forward_hook(lambda module, given, result: dtypes.append(result.dtype))
    gradients = []
    for model in (exact, mixed):
        loss = model.train().loss(model(with_targets), with_targets)["total"]
        assert loss.dtype == torch.float32
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.backbone.encoder.parameters()]))
    assert dtypes == [torch.bfloat16]
    assert gradients[1].dtype == torch.float32
    assert not torch.equal(*gradients)
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.99


@pytest.fixture
def pieces(build, teacher_parts) -> Callable[..., ComposerBGEM3]:
    """A function that builds a model in double precision that embeds some examples at once."""

    def make(chunk_size: int | None, losses: LossWeights = WHOLE_BATCH) -> ComposerBGEM3:
        teacher = FrozenEncoder(*copy.deepcopy(teacher_parts), ALL_NAMES)
        teacher.backbone.double()
        teacher.heads.double()
        model = build(losses=losses, teacher=teacher, special_ids=(0, 1, 2), chunk_size=chunk_size)
        return model.double().train()

    return make


def gradients(model: ComposerBGEM3, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    parts = model.loss(model(batch), batch)
    parts["total"].backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {**found, **{f"loss/{name}": value.detach() for name, value in parts.items()}}


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_pieces_are_exactly_the_whole_batch(size, pieces, pairs, scored_passages):
    """Of 6 examples: also where the last piece is smaller. Losses over the batch are all there."""
    for batch in (pairs, scored_passages):
        floats = [k for k, v in batch.items() if torch.is_tensor(v) and v.is_floating_point()]
        batch = {**batch, **{key: batch[key].double() for key in floats}}
        whole, found = gradients(pieces(None), batch), gradients(pieces(size), batch)
        assert set(found) == set(whole)
        assert sum(key.startswith("loss/") for key in whole) >= 7
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10, msg=name)
    evaluated = [pieces(chunk).eval()(pairs)["dense_vecs"] for chunk in (size, None)]
    close(*evaluated, 1e-12)


def test_pieces_limit_what_is_kept(pieces, pairs):
    """Kept for the backward pass are outputs, not activations; one piece is embedded at a time."""

    def kept(chunk_size: int | None) -> tuple[int, int]:
        model, rows, size = pieces(chunk_size, LossWeights(cosent=1.0)), [], 0

        def pack(value: Tensor) -> Tensor:
            nonlocal size
            size += 0 if value.is_leaf else value.numel()
            return value

        embeddings = model.backbone.embeddings
        hook = embeddings.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            model(pairs)
        hook.remove()
        return max(rows), size

    (all_rows, everything), (rows, little) = kept(None), kept(2)
    assert (all_rows, rows) == (B * N, 2 * N)
    assert little < everything / 20


OF_PASSAGES = ("contrastive", "self_distillation", "score_distillation", "distillation_scores")
PARTS = [name for name in (*PART_OUTPUTS, *OF_PASSAGES) if name != "distillation_similarity"]


@pytest.mark.parametrize("part", [*PARTS, "all"])
def test_every_trained_parameter_has_a_gradient_whatever_the_batch(
    part, pieces, pairs, scored_passages
):
    """DDP waits for all of them; a batch has the parts of the loss that its source has data for."""
    weights = dict.fromkeys(PARTS if part == "all" else [part], 1.0)
    weights |= {"distillation_similarity": 1.0, "temperature": 0.2}  # it applies to every batch
    learned = weights.get("contrastive", 0.0) > 0
    losses = LossWeights(**weights, contrastive_outputs=NAMES, learn_temperature=learned)
    model = pieces(None, losses)
    assert (model.temperature is not None) == learned
    unscored = {key: value for key, value in scored_passages.items() if key != "passage_scores"}
    seen = set()
    for batch in (pairs, scored_passages, unscored):
        found = gradients(model, batch)
        assert all(value is not None for value in found.values())
        seen |= {key.removeprefix("loss/") for key in found if key.startswith("loss/")}
    assert seen - {"lagrangian", "total"} == set(weights) - {"temperature"}
    colbert = "heads.colbert_linear.weight"
    if part == "contrastive":
        assert gradients(model, pairs)[colbert].abs().sum() == 0
        assert gradients(model, scored_passages)[colbert].abs().sum() > 0


def test_a_probe_is_the_loss_of_the_binary_gates(build, with_targets):
    model = build(losses=EVERY_LOSS).train()
    for pruned in (False, True):
        masks = model.l0_module.deterministic_masks(at_target=False) if pruned else PruningMasks()
        vectors = masked_vectors(model, with_targets, masks)
        expected = numpy_losses(vectors, with_targets, EVERY_LOSS.similarity_temperature)
        value = model.probe(with_targets, pruned)
        total = sum(getattr(EVERY_LOSS, name) * part for name, part in expected.items())
        assert float(value) == pytest.approx(total, abs=1e-5)
    assert model.training
    assert not value.requires_grad


@pytest.mark.parametrize(
    ("survivors", "expected"),
    [([*range(6)], [*range(6)]), ([0, 2, 5], [1, 4, 5]), ([3], [5]), ([0, 1], [0, 5])],
)
def test_a_layer_follows_what_its_successor_was_trained_on(survivors, expected):
    survives = torch.zeros(6, dtype=torch.bool)
    survives[survivors] = True
    assert following_layers(survives)[survives].tolist() == expected


@pytest.fixture
def hidden_teacher(teacher_parts) -> FrozenEncoder:
    return FrozenEncoder(*copy.deepcopy(teacher_parts), (HIDDEN,))


def hidden_by_loop(
    states: Tensor, target: Tensor, mask: Tensor, layers: dict[int, int], dimensions: list[int]
) -> float:
    """Mean over layers, texts and tokens of the squared error over the teacher's square."""
    means = []
    for ours, theirs in layers.items():
        for text in range(len(states)):
            errors = []
            for token in range(int(mask[text].sum())):
                t = target[text, theirs, token].double()
                s = torch.zeros_like(t)
                s[dimensions] = states[text, ours, token].double()
                errors.append(float((s - t).square().sum() / t.square().sum()))
            means.append(np.mean(errors))
    return float(np.mean(means))


def test_hidden_loss_is_a_plain_loop_over_surviving_layers(build, hidden_teacher, pairs):
    """While gates move, the layers that count are the open ones of the moment."""
    model = build(losses=DEEP, teacher=hidden_teacher).train()
    with torch.no_grad():
        model.l0_module.log_alpha["layer"].copy_(torch.tensor([2.0, -4.0, 1.0, 2.0]))
    outputs = model(pairs)
    value = model.loss(outputs, pairs)["distillation_hidden"]
    value.backward()
    assert model.backbone.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    masks = model.l0_module.deterministic_masks(at_target=False)
    assert masks.layer.tolist() == [1, 0, 1, 1]
    ids, mask = pairs["input_ids"].flatten(0, 1), pairs["attention_mask"].flatten(0, 1)
    target = hidden_teacher(ids, mask)[HIDDEN]
    states = outputs["hidden_states"].detach().flatten(0, 1)
    expected = hidden_by_loop(states, target, mask, {0: 1, 2: 2, 3: 3}, list(range(H)))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)


def test_an_extracted_student_has_the_masked_students_hidden_loss(
    build_model, tiny_shape, hidden_teacher, gates, pairs
):
    masks = gates().deterministic_masks()
    backbone, heads = build_model(tiny_shape, torch.float32, seed=1)
    keep = backbone.keep_indices(masks)
    ids, mask = pairs["input_ids"].flatten(0, 1), pairs["attention_mask"].flatten(0, 1)
    with torch.no_grad():
        states = compute_outputs(backbone, heads, ids, mask, [HIDDEN], masks)[HIDDEN]
        masked = states[..., keep.hidden]
    cut(backbone, heads, keep)
    kept = {"teacher_dimensions": torch.tensor(keep.hidden), "teacher_layers": keep.layer}
    small = ComposerBGEM3(backbone, heads, None, DEEP, teacher=hidden_teacher, **kept).train()
    value = small.loss(small(pairs), pairs)["distillation_hidden"]
    survives = torch.zeros(tiny_shape.num_hidden_layers, dtype=torch.bool)
    survives[keep.layer] = True
    assert 0 < len(keep.layer) < tiny_shape.num_hidden_layers
    layers = {layer: int(following_layers(survives)[layer]) for layer in keep.layer}
    target = hidden_teacher(ids, mask)[HIDDEN]
    expected = hidden_by_loop(masked, target, mask, layers, keep.hidden)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
