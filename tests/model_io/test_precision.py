"""Rounding of weights, and what is said of it."""

import math

import pytest
import torch

from bge_pruning.model_io.model_folder import (
    DTYPES,
    dtype_name,
    precision_loss,
    round_tensor,
    round_weights,
)

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_rounding_is_within_its_unit_roundoff(dtype, bits):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(10_000, generator=generator).double() * 100
    numbers = numbers[numbers.abs() > 2**-14].float()
    error = (round_tensor("w", numbers, dtype).float() - numbers).abs() / numbers.abs()
    assert 2 ** -(bits + 0.5) < error.max() <= 2**-bits
    numbers = torch.linspace(-(2**-14), 2**-14, 10_001)  # float16 has fixed steps near zero
    error = (round_tensor("w", numbers, torch.float16).float() - numbers).abs()
    assert error.max() <= 2**-25


def test_names_of_precisions_and_those_that_are_refused():
    assert [dtype_name(dtype) for dtype in DTYPES.values()] == ["float32", "float16", "bfloat16"]
    for dtype in DTYPES.values():
        numbers = torch.rand(3).to(dtype)
        assert round_tensor("w", numbers, dtype) is numbers
    for dtype in (torch.float64, torch.int8, None):
        message = (
            rf"^dtype {dtype} is not one of torch\.float32, .* To fix, choose one: fp32, fp16, bf"
        )
        with pytest.raises(ValueError, match=message):
            round_tensor("w", torch.ones(2), dtype)


def test_numbers_beyond_the_range_are_refused_by_name():
    """Not where only their sum is; what is not finite already is left to validation."""
    message = r"^w holds 65520, and float16 ends at 65504\. To fix, write the model in bf16 or fp32"
    with pytest.raises(ValueError, match=message):
        round_tensor("w", torch.tensor([1.0, -65520.0]), torch.float16)
    assert round_tensor("w", torch.tensor([65519.0]), torch.float16) == 65504
    round_tensor("w", torch.tensor([65520.0]), torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 ends at 3.38953e\\+38"):
        round_tensor("w", torch.tensor([torch.finfo(torch.float32).max]), torch.bfloat16)
    numbers = torch.full((9,), 3e38)
    assert torch.equal(round_tensor("w", numbers, torch.bfloat16), numbers.bfloat16())
    numbers = torch.full((9,), 6e4)
    assert torch.equal(round_tensor("w", numbers, torch.float16), numbers.half())
    numbers = torch.tensor([math.nan, math.inf, 1.0])
    assert round_tensor("w", numbers, torch.float16).isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_are_rounded_in_place(dtype, build_model, tiny_shape):
    backbone, heads = build_model(tiny_shape, torch.float32)
    before = [p.clone() for m in (backbone, heads) for p in m.parameters()]
    round_weights(backbone, heads, dtype)
    after = [p for m in (backbone, heads) for p in m.parameters()]
    for old, new in zip(before, after, strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(new, old.to(dtype).float())
        assert not torch.equal(new, old)
    # Rounding and cutting can change places.
    _, cut_first = build_model(tiny_shape, torch.float32)
    keep = list(range(0, 32, 2))
    heads.prune(keep)
    cut_first.prune(keep)
    round_weights(backbone, cut_first, dtype)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, cut_first.state_dict()[name])


def test_loss_is_its_formulas():
    before = {"dense_vecs": torch.eye(2), "token_weights": torch.tensor([[1.0, 0.0]])}
    vectors, weights = torch.tensor([[0.8, 0.6], [0.0, 1.0]]), torch.tensor([[1.0, 0.25]])
    found = precision_loss(before, {"dense_vecs": vectors, "token_weights": weights})
    assert found == pytest.approx({"dense_cosine": 0.8, "dense_vecs": 0.6, "token_weights": 0.25})
