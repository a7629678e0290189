"""Under 16-bit autocast, where the trainer computes the loss, it is that of float32."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import LossWeights
from bge_pruning.models.structural_pruning import AXES
from bge_pruning.models.teacher import HIDDEN

B, T = 6, 7
# Every part of the loss, those of scored pairs first.
PARTS = [n for n, value in vars(LossWeights()).items() if value is not False and value == 0.0]


def make_outputs(hidden: int, layers: int, seed: int, texts: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(B, texts, *size, generator=generator)

    return {
        # Near each other, as the texts of real models are: most of a cosine is the same for all.
        "dense_vecs": normalize(0.5 * noise(hidden) + 2.0, dim=-1),
        "token_weights": noise(T).relu(),
        "colbert_vecs": normalize(0.5 * noise(T - 1, hidden) + 2.0, dim=-1),
        HIDDEN: noise(layers, T, hidden),
    }


def make_batch(hidden: int, layers: int, texts: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)
    numbers = torch.arange(B * (texts - 1)).view(B, texts - 1)
    return {
        "input_ids": torch.randint(4, 30, (B, texts, T), generator=generator),
        "attention_mask": torch.ones(B, texts, T, dtype=torch.long),
        "lengths": [[T] * texts] * B,
        "scores": torch.rand(B, generator=generator),
        "passage_texts": numbers,
        "positive_texts": numbers[:, :1],
        "passage_scores": torch.rand(B, texts - 1, generator=generator),
        **{f"teacher_{n}": v for n, v in make_outputs(hidden, layers, 2, texts).items()},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("part", [*PARTS, "lagrangian", "binarization"])
def test_a_loss_and_its_gradients_are_those_of_float32(
    part, dtype, build_model, tiny_shape, target_shape
):
    """Of equal outputs of the model, which are float32 or, of a linear head, 16-bit numbers."""
    gates = L0Module(tiny_shape, AXES, target_shape, seed=2, binarization=1.0)
    gates.warmup_progress, gates.binarization_progress = 1.0, 0.5
    gates.lambda_2["hidden"].data.fill_(3.0)
    sizes = tiny_shape.hidden_size, tiny_shape.num_hidden_layers
    texts = 2 if part in ("sts_regression", "cosent") else 3
    weights = LossWeights(
        **{part if part in PARTS else "distillation_hidden": 1.0},
        contrastive_outputs=("dense", "sparse", "colbert"),
    )
    model = ComposerBGEM3(*build_model(tiny_shape, torch.float32), gates, weights).train()
    found = []
    given = {n: v.to(dtype) for n, v in make_outputs(*sizes, 1, texts).items()}
    batch = make_batch(*sizes, texts)
    if part not in PARTS[:2]:
        del batch["scores"]
    for autocast in (False, True):
        outputs = {n: v if autocast else v.float() for n, v in given.items()}
        outputs = {n: v.detach().requires_grad_() for n, v in outputs.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = model.loss(outputs, batch)[part]
        leaves = [*outputs.values(), *gates.parameters()]
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        found.append([value, *(g for g in gradients if g is not None)])
    (exact, *expected), (mixed, *gradients) = found
    assert mixed.dtype == torch.float32 and torch.equal(exact, mixed)
    assert any(gradient.any() for gradient in gradients)
    for wanted, gradient in zip(expected, gradients, strict=True):
        assert torch.equal(wanted.to(gradient.dtype), gradient)
