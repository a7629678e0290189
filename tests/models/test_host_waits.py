"""A step never asks the device for a number: a GPU would stand still until the host has it.

Which operations would wait is seen on the CPU too.
"""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bge_pruning.algorithms.non_finite import compute_norms, watched_parameters
from bge_pruning.models import packing as attention
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import LossWeights
from bge_pruning.models.structural_pruning import AXES
from bge_pruning.models.teacher import HIDDEN, FrozenEncoder
from bge_pruning.training.optimization import l0_groups, weight_groups

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item"}
WAITING |= {"_unique2", "unique_consecutive", "unique_dim", "repeat_interleave"}
NAMES = ["alignment", "similarity", "sparse", "colbert", "hidden"]
NAMES = ["sts_regression", "cosent", *(f"distillation_{name}" for name in NAMES)]
DISTILLED = LossWeights(
    **dict.fromkeys([*NAMES, "distillation_scores"], 1.0), teacher_scores_in_batch=True
)
CACHED = LossWeights(distillation_alignment=1.0, distillation_similarity=1.0)
COMPARED = LossWeights(
    contrastive=1.0,
    self_distillation=1.0,
    score_distillation=1.0,
    contrastive_outputs=("dense", "sparse", "colbert"),
)


class NoWaiting(TorchDispatchMode):
    """Fails at an operation whose result the host needs."""

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        # On the CPU these are no operations; new_tensor copies from ordinary memory.
        for name in ("tolist", "numpy", "cpu", "new_tensor"):

            def wait(*_: Any, name: str = name) -> None:
                raise AssertionError(f"{name} waits for the device")

            self._patch.setattr(torch.Tensor, name, wait)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        picks = name == "index" and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        # A size that is given need not be counted.
        sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None
        if (name in WAITING or picks) and not sized:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


ACTIONS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "new_tensor": lambda x: x.new_tensor(1.0),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_waiting_is_noticed(action):
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        ACTIONS[action](torch.randn(5))


def make_batch(lengths: list[list[int]], hidden: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor(lengths)
    mask = (torch.arange(int(counts.max())) < counts[..., None]).long()
    ids = torch.randint(4, 99, mask.shape, generator=generator)
    return {
        "input_ids": torch.where(mask.bool(), ids, 1),
        "attention_mask": mask,
        "lengths": lengths,
        "scores": torch.rand(len(lengths), generator=generator),
        "teacher_dense_vecs": torch.randn(*counts.shape, hidden, generator=generator),
        "passage_texts": torch.arange(len(lengths))[:, None],
        "positive_texts": torch.arange(len(lengths))[:, None],
        "passage_scores": torch.rand(len(lengths), 1, generator=generator),
    }


@pytest.fixture
def gates(tiny_shape, target_shape) -> L0Module:
    module = L0Module(tiny_shape, AXES, target_shape, seed=2, binarization=1.0)
    module.warmup_progress, module.binarization_progress = 1.0, 0.5
    return module


@pytest.mark.parametrize("layout", ["groups", "varlen", "padded"])
@pytest.mark.parametrize(
    "weights", [CACHED, DISTILLED, COMPARED], ids=["cached", "all parts, a teacher", "passages"]
)
@pytest.mark.parametrize("chunk_size", [None, 2], ids=["whole", "pieces"])
def test_a_step_waits_for_nothing(
    layout, weights, chunk_size, build_model, gates, tiny_shape, monkeypatch, attend_within_texts
):
    """Gates, losses, a teacher, backward pass, looking for broken numbers, clipping, optimizer."""
    monkeypatch.setattr(attention, "varlen_attn", attend_within_texts)
    monkeypatch.setattr(
        "bge_pruning.models.bge_m3_backbone.varlen_applies", lambda *_: layout == "varlen"
    )
    parts = build_model(tiny_shape, torch.float32, seed=1)
    names = weights.distilled
    teacher = FrozenEncoder(*copy.deepcopy(parts), names) if HIDDEN in names else None
    arguments = {"special_ids": (0, 1, 2, 3), "chunk_size": chunk_size}
    model = ComposerBGEM3(*parts, gates, weights, teacher, **arguments).train()
    model.backbone.compiled_for = True if layout == "padded" else None
    groups = weight_groups([model.backbone, model.heads], 1e-4, 0.01)
    optimizer = torch.optim.AdamW(groups + l0_groups(gates, 0.1, 0.02, 1.0), lr=1e-4, fused=True)
    watched = watched_parameters(model, optimizer)
    batch = make_batch([[3, 7], [1, 7], [5, 5], [2, 4]], tiny_shape.hidden_size)
    before = model.backbone.encoder.layer[0].intermediate.dense.weight.detach().clone()
    with NoWaiting():
        loss = model.loss(model(batch), batch)["total"]
        loss.backward()
        compute_norms([w.parameter.grad for w in watched])
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gates.clamp_()
    assert not torch.equal(model.backbone.encoder.layer[0].intermediate.dense.weight, before)


@pytest.mark.parametrize("chunk_size", [None, 2], ids=["whole", "pieces"])
def test_gradients_of_drawn_rows_wait_for_nothing(chunk_size, build_model, tiny_shape):
    parts = build_model(tiny_shape, torch.float32, seed=1)
    model = ComposerBGEM3(*parts, None, CACHED, chunk_size=chunk_size).train()
    model.update_drawn_rows()
    batch = make_batch([[3, 7], [1, 7], [5, 5], [2, 4]], tiny_shape.hidden_size)
    with NoWaiting():
        model.loss(model(batch), batch)["total"].backward()
    assert model.backbone.embeddings.word_embeddings.weight.grad.is_sparse


def test_without_lengths_it_waits_to_count_tokens(build_model, tiny_shape):
    model = ComposerBGEM3(*build_model(tiny_shape, torch.float32), None, CACHED).train()
    batch = make_batch([[3, 7], [1, 7]], tiny_shape.hidden_size)
    del batch["lengths"]
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        model(batch)
