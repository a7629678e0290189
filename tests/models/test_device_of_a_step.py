"""A training step computes on the device of its model and batch, and on no other.

A GPU is not needed to see it: torch's fake tensors carry a device, and an operation on two devices
fails, as does one whose result the host would read. The fake device is torch's "meta", because
autograd asks a GPU's driver for a stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import LossWeights
from bge_pruning.models.shape_choice import MaskLikelihood
from bge_pruning.models.structural_pruning import AXES, SHAPE_FIELDS
from bge_pruning.models.teacher import HIDDEN, FrozenEncoder
from bge_pruning.training.optimization import l0_groups, weight_groups

DEVICE = "meta"
B, N, T, H = 2, 2, 5, 8
LENGTHS = [[2, 5], [3, 3]]
SHAPE = EncoderShape(H, 2, 2, 8, 50, 4, 10, colbert_dim=H)
SMALL = {"head": 1, "hidden": 4, "intermediate": 4, "layer": 1}
TARGETS = {
    "shape": lambda axes: {"target": replace(SHAPE, **{SHAPE_FIELDS[a]: SMALL[a] for a in axes})},
    "parameters": lambda _: {"target_parameters": 500.0},
    "speed-up": lambda _: {"target_speedup": 1.5},
}
DISTILLED = [
    f"distillation_{name}" for name in ("alignment", "similarity", "sparse", "colbert", "hidden")
]
COMPARED = ["contrastive", "self_distillation", "score_distillation"]
LOSSES = {name: {name: 1.0} for name in ["sts_regression", "cosent", *DISTILLED, *COMPARED]}
LOSSES["learned temperature"] = {"contrastive": 1.0, "learn_temperature": True}
LOSSES["a teacher's scores"] = {"distillation_scores": 1.0, "teacher_scores_in_batch": True}
LOSSES["all"] = LOSSES["a teacher's scores"] | dict.fromkeys(
    ["sts_regression", "cosent", *DISTILLED, *COMPARED], 1.0
)


@pytest.fixture(autouse=True)
def fake_device(monkeypatch) -> Iterator[None]:
    for name in ("autocast", "is_autocast_enabled"):  # which know no such device
        of_device = getattr(torch, name)

        def of_a_gpu(device: str, *given: Any, of_device: Any = of_device, **options: Any) -> Any:
            return of_device("cuda" if device == DEVICE else device, *given, **options)

        monkeypatch.setattr(torch, name, of_a_gpu)
    # With a budget the host reads the gates, to choose the shape among many.
    monkeypatch.setattr(MaskLikelihood, "__call__", lambda _, shape: -shape.num_hidden_layers)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def make_batch(weights: LossWeights, teaches: bool) -> dict[str, Any]:
    def numbers(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=DEVICE)

    long = torch.int64
    batch: dict[str, Any] = {"lengths": LENGTHS}
    batch |= {name: numbers(B, N, T, dtype=long) for name in ("input_ids", "attention_mask")}
    if weights.sts_regression or weights.cosent:
        batch["scores"] = numbers(B)
    if weights.compares_passages:
        batch |= {"passage_texts": numbers(B, N - 1, dtype=long)}
        batch |= {"positive_texts": numbers(B, 2, dtype=long)}
        batch |= {"passage_scores": numbers(B, N - 1)}
    if not teaches:
        sizes = {"dense_vecs": (H,), "token_weights": (T,), "colbert_vecs": (T - 1, H)}
        sizes |= {HIDDEN: (SHAPE.num_hidden_layers, T, H)}
        batch |= {f"teacher_{n}": numbers(B, N, *sizes[n]) for n in weights.distilled}
    return batch


def build(loss: dict[str, Any], gates: L0Module | None, teaches: bool) -> ComposerBGEM3:
    def encoder() -> tuple[XLMRobertaBackbone, EmbeddingHeads]:
        return XLMRobertaBackbone(SHAPE), EmbeddingHeads(H, "cls", True, H)

    weights = LossWeights(**{"contrastive_outputs": ("dense", "sparse", "colbert"), **loss})
    teacher = FrozenEncoder(*encoder(), weights.distilled) if teaches and weights.distils else None
    arguments = {"special_ids": (0, 1, 2), "chunk_size": 1 if teaches else None}
    return ComposerBGEM3(*encoder(), gates, weights, teacher, **arguments).to(DEVICE).train()


def take_step(model: ComposerBGEM3, batch: dict[str, Any]) -> None:
    two = [p for p in (model.temperature, model.backbone, model.heads) if p is not None]
    groups = weight_groups(two, 1e-4, 0.01)
    if model.l0_module is not None:
        groups += l0_groups(model.l0_module, 0.1, 0.02, 1.0)
    optimizer = torch.optim.SGD(groups, lr=1e-4)
    parts = model.loss(model(batch), batch)
    assert {value.device.type for value in parts.values()} == {DEVICE}
    parts["total"].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    if model.l0_module is not None:
        assert all(p.grad is not None for p in model.l0_module.parameters())
        model.l0_module.clamp_()


def make_gates(axes: Sequence[str], target: str) -> L0Module:
    gates = L0Module(SHAPE, axes, **TARGETS[target](axes), binarization=1.0)
    gates.warmup_progress, gates.binarization_progress = 1.0, 0.5
    return gates


@pytest.mark.parametrize("target", TARGETS)
def test_every_subset_of_axes_and_every_target(gated_axes, target):
    gates = make_gates(gated_axes, target)
    # Of the losses only this one looks at gates.
    model = build(LOSSES["distillation_hidden"], gates, teaches=False)
    take_step(model, make_batch(model.loss_weights, teaches=False))


@pytest.mark.parametrize("gated", [False, True], ids=["plain, cached", "gated, taught in pieces"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss, gated):
    model = build(LOSSES[loss], make_gates(AXES, "shape") if gated else None, teaches=gated)
    take_step(model, make_batch(model.loss_weights, teaches=gated))


FAULTS = {
    "two devices": lambda x: x + torch.tensor([1.0, 2.0]),
    "a number for the host": lambda x: x * float(x.sum()),
    "numpy": lambda x: x + torch.from_numpy(x.detach().cpu().numpy()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault):
    with pytest.raises(Exception, match="two different devices|_local_scalar_dense|numpy"):
        FAULTS[fault](torch.zeros(2, device=DEVICE))
