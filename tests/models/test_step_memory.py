"""The estimate against what a step's tensors really take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bge_pruning.algorithms import row_updates
from bge_pruning.algorithms.row_updates import AdamW
from bge_pruning.models import embedding_heads, encoder_shape, gather, objective
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters, step_memory
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import LossWeights, loss_memory
from bge_pruning.models.structural_pruning import AXES
from bge_pruning.models.teacher import FrozenEncoder
from bge_pruning.training.optimization import l0_groups, weight_groups
from bge_pruning.utils.model_analysis import measure_peak_bytes

SHAPES = {
    "wide units": EncoderShape(128, 4, 4, 512, 500, 32, 130, colbert_dim=128),
    "many layers": EncoderShape(128, 4, 8, 256, 500, 32, 130, colbert_dim=128),
    "large vocabulary": EncoderShape(128, 4, 2, 256, 60_000, 32, 130, colbert_dim=128),
}


def build(shape: EncoderShape) -> tuple[XLMRobertaBackbone, EmbeddingHeads]:
    heads = EmbeddingHeads(shape.hidden_size, "cls", True, shape.colbert_dim)
    return XLMRobertaBackbone(shape), heads


def estimate(*given: Any, **options: bool) -> float:
    return sum(step_memory(*given, **options).values())


def measure(
    shape: EncoderShape,
    lengths: list[int],
    gated: bool,
    teacher: bool,
    frozen_embeddings: bool = False,
    checkpointing: bool = False,
    device: str = "cpu",
    autocast: bool = False,
    drawn_rows: int | None = None,
) -> float:
    """Tensors of a step, the weights and moments that were there before included."""
    target = replace(
        shape,
        num_attention_heads=2,
        hidden_size=64,
        num_hidden_layers=shape.num_hidden_layers // 2,
        intermediate_size=shape.intermediate_size // 2,
    )
    gates = L0Module(shape, AXES, target, None, seed=0) if gated else None
    frozen = FrozenEncoder(*build(shape), ("dense_vecs",)) if teacher else None
    model = ComposerBGEM3(
        *build(shape), gates, LossWeights(distillation_alignment=1.0), frozen
    ).train()
    model.to(device)
    model.backbone.activation_checkpointing = checkpointing
    if frozen_embeddings:
        model.backbone.embeddings.freeze_tables()
    if drawn_rows is not None:
        model.update_drawn_rows()
    groups = weight_groups([model.backbone, model.heads], 1e-5, 0.01)
    groups += l0_groups(gates, 0.1, 0.02, 1.0) if gated else []
    optimizer = AdamW(groups, model.row_tables(), lr=1e-5, fused=True)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, shape.vocab_size, mask.shape) * mask + (1 - mask)
    vectors = F.normalize(torch.randn(len(lengths), shape.hidden_size), dim=-1)
    batch = {"input_ids": ids[:, None], "attention_mask": mask[:, None]}
    batch |= {} if teacher else {"teacher_dense_vecs": vectors[:, None]}
    batch = {name: value.to(device) for name, value in batch.items()}

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model.loss(model(batch), batch)["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the moments are made
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    copies = 2 if teacher else 1
    return measure_peak_bytes(step, device) + moments + copies * 4.0 * count_parameters(shape).total


@pytest.mark.parametrize("teacher", [False, True], ids=["cached", "on the fly"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_is_near_the_measurement(name, gated, teacher):
    lengths = [100, 60, 128, 100, 20, 90, 128, 110] * 2
    shape = SHAPES[name]
    found = measure(shape, lengths, gated, teacher)
    parts = step_memory(shape, sum(lengths), gated, teacher)
    assert sum(parts.values()) == pytest.approx(found, rel=0.15)
    if name != "large vocabulary":
        # Without the weights, which are known: what the step itself takes.
        weights = parts["weights and optimizer"] + (4.0 * count_parameters(shape).total) * teacher
        assert sum(parts.values()) - weights == pytest.approx(found - weights, rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", SHAPES)
def test_frozen_embeddings_and_checkpointing(name, checkpointing):
    lengths = [100, 60, 128, 100, 20, 90, 128, 110] * 2
    options = {"frozen_embeddings": True, "checkpointing": checkpointing}
    found = measure(SHAPES[name], lengths, True, False, **options)
    expected = estimate(SHAPES[name], sum(lengths), True, False, **options)
    assert expected == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_words_that_the_batch_has(name, checkpointing, monkeypatch):
    lengths = [100, 60, 128, 100, 20, 90, 128, 110] * 2
    options = {"drawn_rows": min(sum(lengths), SHAPES[name].vocab_size)}
    options["checkpointing"] = checkpointing
    monkeypatch.setattr(encoder_shape, "ROWS_AT_ONCE", 0)  # here no other row moves
    monkeypatch.setattr(row_updates, "ROOM", 1)
    found = measure(SHAPES[name], lengths, True, False, **options)
    expected = estimate(SHAPES[name], sum(lengths), True, False, **options)
    assert expected == pytest.approx(found, rel=0.15)
    if name == "large vocabulary":
        assert found < 0.5 * measure(SHAPES[name], lengths, True, False)


def test_padding_takes_nothing_and_half_precision_less(bge_m3_shape):
    shape = SHAPES["many layers"]
    short = measure(shape, [16] * 15 + [128], True, False)
    full = measure(shape, [128] * 16, True, False)
    assert short < 0.5 * full
    shape = SHAPES["wide units"]
    assert estimate(shape, 9000, True, True, half=True) < estimate(shape, 9000, True, True)
    parts = step_memory(shape, 1, True, False)
    assert parts["activations or gradients"] == 4.0 * count_parameters(shape).total
    # By the estimate: weights, gradients, moments and activations in float32, with gates.
    assert 13 < estimate(bge_m3_shape, 8 * 512, True, False) / 2**30 < 14


OUTPUTS = ("dense", "sparse", "colbert")
COMPARED = {"contrastive_outputs": OUTPUTS}
LOSSES = {
    "dense alone": {"contrastive": 1.0},
    "all outputs": {"contrastive": 1.0, **COMPARED},
    "own passages": {"score_distillation": 1.0, **COMPARED},
    "a teacher's scores": {"distillation_scores": 1.0, **COMPARED},
    "a teacher's scores of all": {
        "distillation_scores": 1.0,
        "teacher_scores_in_batch": True,
        **COMPARED,
    },
    "multi-vectors": {"distillation_colbert": 1.0},
    "both": {"contrastive": 1.0, "distillation_colbert": 1.0, **COMPARED},
    "hidden states": {"distillation_hidden": 1.0, "distillation_similarity": 1.0},
}
LOSS_SHAPES = {
    "wide multi-vectors": EncoderShape(64, 2, 2, 64, 200, 32, 130, colbert_dim=512),
    "wide layers": EncoderShape(128, 4, 4, 512, 500, 32, 130, colbert_dim=128),
    "large vocabulary": EncoderShape(128, 4, 2, 256, 30_000, 32, 130, colbert_dim=128),
}
ROWS, WIDTH, LENGTH, QUERY, RANKS = 6, 4, 128, 8, 8


@pytest.fixture
def many_ranks(monkeypatch) -> None:
    """The other ranks have the same texts."""
    monkeypatch.setattr(gather, "world_size", lambda: RANKS)
    monkeypatch.setattr(
        gather, "gather_rows", lambda rows: torch.cat([rows, *[rows.detach()] * (RANKS - 1)])
    )
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)


def measure_loss(
    shape: EncoderShape, weights: LossWeights, rows_at_once: int | None, teacher: bool
) -> float:
    """Tensors of a step without gates, moments and weights: queries with their passages."""
    frozen = FrozenEncoder(*build(shape), weights.distilled) if teacher else None
    options = {"chunk_size": rows_at_once, "special_ids": (0, 1, 2)}
    model = ComposerBGEM3(*build(shape), None, weights, frozen, **options).train()
    mask = torch.ones(ROWS, WIDTH, LENGTH, dtype=torch.long)
    mask[:, 0, QUERY:] = 0
    numbers = torch.arange(ROWS * (WIDTH - 1)).view(ROWS, WIDTH - 1)
    batch: dict[str, Any] = {
        "input_ids": torch.where(mask.bool(), torch.randint(4, shape.vocab_size, mask.shape), 1),
        "attention_mask": mask,
        "lengths": mask.sum(-1).tolist(),
        "passage_texts": numbers,
        "positive_texts": numbers[:, :1],
        "passage_scores": torch.rand(numbers.shape),
    }
    targets = {}
    if not teacher:
        sizes = {
            "dense_vecs": (shape.hidden_size,),
            "token_weights": (LENGTH,),
            "colbert_vecs": (LENGTH - 1, shape.colbert_dim),
        }
        targets = {f"teacher_{n}": torch.rand(ROWS, WIDTH, *sizes[n]) for n in weights.distilled}

    def step() -> None:
        outputs = model(batch)  # the trainer keeps them too
        model.loss(outputs, batch | targets)["total"].backward()
        model.zero_grad()

    peak = measure_peak_bytes(step) + sum(value.nbytes for value in targets.values())
    return peak + (4.0 * count_parameters(shape).total if teacher else 0.0)


def check_loss(name: str, loss: str, rows_at_once: int | None, ranks: int = 1) -> None:
    shape, weights = LOSS_SHAPES[name], LossWeights(**LOSSES[loss])
    teacher = loss == "hidden states"
    found = measure_loss(shape, weights, rows_at_once, teacher)
    size = (ROWS, WIDTH, LENGTH, rows_at_once)
    memory = loss_memory(weights, shape, *size, ranks, cached=not teacher)
    tokens = (rows_at_once or ROWS) * (QUERY + (WIDTH - 1) * LENGTH)
    parts = step_memory(shape, tokens, False, teacher, loss=memory)
    assert sum(parts.values()) - parts["weights and optimizer"] == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("rows_at_once", [None, 1], ids=["whole", "in pieces"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", LOSS_SHAPES)
def test_what_losses_take(name, loss, rows_at_once, monkeypatch):
    for module in (embedding_heads, objective):  # a block of this batch too is a small part
        monkeypatch.setattr(module, "BLOCK_PRODUCTS", 1 << 16)
    check_loss(name, loss, rows_at_once)


@pytest.mark.parametrize("rows_at_once", [None, 1], ids=["whole", "in pieces"])
@pytest.mark.parametrize(
    "loss", ["all outputs", "own passages", "both", "a teacher's scores of all"]
)
def test_what_the_passages_of_all_ranks_take(loss, rows_at_once, many_ranks, monkeypatch):
    for module in (embedding_heads, objective):
        monkeypatch.setattr(module, "BLOCK_PRODUCTS", 1 << 16)
    check_loss("wide multi-vectors", loss, rows_at_once, RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("frozen_embeddings", [False, True], ids=["all trained", "frozen"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
def test_bge_m3_measured(bge_m3_shape, frozen_embeddings, checkpointing):
    """Random weights, one step of 8 texts of 512 tokens: needs 15 GiB and two minutes."""
    options = {"frozen_embeddings": frozen_embeddings, "checkpointing": checkpointing}
    found = measure(bge_m3_shape, [512] * 8, True, False, **options)
    assert estimate(bge_m3_shape, 8 * 512, True, False, **options) == pytest.approx(found, rel=0.15)
    assert found < 24 * 2**30


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_bge_m3_on_a_gpu(bge_m3_shape, autocast, checkpointing):
    """8 texts of 512 tokens in 24 GiB, as it was estimated."""
    options = {"device": "cuda", "autocast": autocast, "checkpointing": checkpointing}
    found = measure(bge_m3_shape, [512] * 8, True, False, **options)
    options = {"half": autocast, "checkpointing": checkpointing}
    assert estimate(bge_m3_shape, 8 * 512, True, False, **options) == pytest.approx(found, rel=0.15)
    assert found < 24 * 2**30
