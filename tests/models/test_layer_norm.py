"""The written-out gradient against autograd's; the compiled form against single operations."""

import logging
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from bge_pruning.models import layer_norm as module

EPS = 1e-5
# torch's own compiler does so with every autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
HIDDEN = 12
WHICH = pytest.mark.parametrize(
    ("hidden", "layer"), [(True, True), (True, False), (False, True)], ids=["both", "LN", "layer"]
)


def by_formula(u: Tensor, weight: Tensor, bias: Tensor, eps: float, z: Tensor) -> Tensor:
    n = z.sum()
    mean = (z * u).sum(-1, keepdim=True) / n
    variance = (z * (u - mean) ** 2).sum(-1, keepdim=True) / n
    return ((u - mean) / torch.sqrt(variance + eps) * weight + bias) * z


def arguments(dtype: torch.dtype = torch.float64, soft: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    z = torch.sigmoid(random(12)) if soft else (random(12) > 0).to(dtype)
    values = [2.0 * random(3, 5, 12) + 1.0, random(12), random(12), z]
    return [value.requires_grad_() for value in values]


@pytest.mark.parametrize("soft", [True, False])
def test_values_and_gradients_are_the_formulas(soft):
    found = []
    for function in (module.masked_layer_norm, by_formula):
        u, weight, bias, z = arguments(soft=soft)
        y = function(u, weight, bias, EPS, z)
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        found.append([y, u.grad, weight.grad, bias.grad, z.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kept", [1, 2, 7, 12])
def test_binary_gates_are_layer_norm_over_the_kept_dimensions(kept):
    u, weight, bias, _ = arguments()
    index = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:kept]
    z = torch.zeros(12, dtype=u.dtype).index_fill(0, index, 1.0)
    found = module.masked_layer_norm(u, weight, bias, EPS, z)
    expected = nn.functional.layer_norm(u[..., index], (kept,), weight[index], bias[index], EPS)
    torch.testing.assert_close(found[..., index], expected, atol=1e-12, rtol=0)
    assert not found[..., z == 0].any()


def test_statistics_are_float32_under_autocast_and_of_half_precision():
    """In bfloat16 a mean of 1000 would swallow a spread of 1."""
    u, weight, bias, z = (value.detach() for value in arguments(torch.float32))
    expected = module.masked_layer_norm(u + 1000.0, weight, bias, EPS, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.masked_layer_norm(u + 1000.0, weight, bias, EPS, z), expected)
    half = u.bfloat16().requires_grad_()
    y = module.masked_layer_norm(half, weight, bias, EPS, z)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert half.grad.dtype == torch.bfloat16


def make_inputs(tokens: int, hidden: bool, layer: bool) -> list[Tensor | float | None]:
    generator = torch.Generator().manual_seed(tokens)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).requires_grad_()

    gates = torch.rand(HIDDEN, generator=generator).requires_grad_() if hidden else None
    skip = random(tokens, HIDDEN) if layer else None
    gate = torch.rand((), generator=generator).requires_grad_() if layer else None
    first = [random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN), random(HIDDEN)]
    return [*first, 1e-5, gates, skip, gate]


def values_and_gradients(function, inputs, autocast) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(*inputs)
    y.backward(torch.arange(y.numel()).view_as(y).sin())
    return [y.detach(), *(v.grad for v in inputs if isinstance(v, Tensor))]


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def assert_same(compiled, tokens, hidden, layer, autocast=False) -> None:
    for count in tokens:
        found, expected = (
            values_and_gradients(function, make_inputs(count, hidden, layer), autocast)
            for function in (compiled, module.compute_residual_norm)
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@WHICH
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_compiled_for_any_number_of_tokens(hidden, layer, autocast, counter):
    assert_same(module.compile_residual_norm(counter), (5, 7, 1, 30), hidden, layer, autocast)
    assert counter.frame_count <= 2  # one token alone may have a graph of its own


def test_every_way_to_call_it_is_compiled(counter):
    """Training and evaluation, with and without autocast, and both precisions, of all layers."""
    counter = CompileCounterWithBackend("eager")  # how many there are, not what they become
    compiled = module.compile_residual_norm(counter)
    ways = list(product([(True, True), (True, False), (False, True)], [False, True], [False, True]))
    for _ in range(2):
        for dtype in (torch.float32, torch.float64):
            for gates, autocast, grad in ways:
                inputs = make_inputs(5, *gates)
                inputs = [v.to(dtype) if isinstance(v, Tensor) else v for v in inputs]
                with torch.autocast("cpu", enabled=autocast), torch.set_grad_enabled(grad):
                    found = compiled(*inputs)
                    torch.testing.assert_close(found, module.compute_residual_norm(*inputs))
    assert counter.frame_count >= 2 * len(ways)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gate_at_its_end_gives_exactly_that_end(compiled, counter):
    norm = nn.LayerNorm(HIDDEN)
    function = module.compile_residual_norm(counter) if compiled else module.compute_residual_norm
    y, residual, _, _, eps, hidden_z, skip, _ = make_inputs(6, True, True)
    given = (y, residual, norm.weight, norm.bias, eps, hidden_z, skip)
    assert torch.equal(function(*given, torch.tensor(0.0)), skip)
    open_layer = function(*given, torch.tensor(1.0))
    torch.testing.assert_close(open_layer, module.residual_norm(y, residual, norm, hidden_z))


def test_without_gates_it_is_the_layers_own_norm():
    norm, (y, residual, *_) = nn.LayerNorm(HIDDEN), make_inputs(6, False, False)
    assert torch.equal(module.residual_norm(y, residual, norm), norm(residual + y))


def test_where_nothing_compiles_it_runs_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(module, "compile_failure", lambda device: "no Triton")
    module.fused.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [module.fused("cuda") for _ in range(2)]
    assert found == [module.compute_residual_norm] * 2
    assert [r.message.partition(",")[0] for r in caplog.records] == [
        "torch.compile does not work on cuda (no Triton)"
    ]
    module.fused.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("gates", [(True, True), (True, False)], ids=["both", "LN"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_on_the_gpu_as_on_the_cpu(gates, autocast):
    function = module.fused("cuda")
    assert function is not module.compute_residual_norm
    for tokens in (5, 300):
        inputs = make_inputs(tokens, *gates)
        moved = [v.detach().cuda().requires_grad_() if isinstance(v, Tensor) else v for v in inputs]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            found = function(*moved)
        found.backward(torch.arange(found.numel()).view_as(found).sin().cuda())
        expected = values_and_gradients(module.compute_residual_norm, inputs, autocast)
        ours = [found.detach(), *(v.grad for v in moved if isinstance(v, Tensor))]
        for value, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(value.cpu(), wanted, atol=1e-4, rtol=1e-4)
