"""Gates per axis, their expected cost, and the constraint that holds them to a target."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bge_pruning.models.encoder_shape import (
    EncoderShape,
    count_parameters,
    expected_operations,
    forward_flops,
)
from bge_pruning.models.hard_concrete import LOG_ALPHA_MAX, LOG_ALPHA_MIN, THRESHOLD
from bge_pruning.models.l0_module_embedding import L0Module, distances_to_binary
from bge_pruning.models.shape_choice import shapes_near_budget
from bge_pruning.models.structural_pruning import AXES, SHAPE_FIELDS

GATES = {"head": (4, 4), "hidden": (32,), "intermediate": (4, 64), "layer": (4,)}
KINDS = ("shape", "parameters", "operations")
MIDDLE = EncoderShape(256, 4, 6, 1024, 500, head_dim=64, colbert_dim=256)


def aim(kind: str, shape: EncoderShape) -> dict[str, object]:
    """Arguments of a target of half the size, of any kind."""
    if kind == "shape":
        return {"target": half(shape, AXES)}
    if kind == "parameters":
        return {"target_parameters": count_parameters(shape).encoder / 2}
    return {"target_speedup": 2.0, "target_length": 300}


def cost(kind: str, shape: EncoderShape) -> float:
    return forward_flops(shape, [300]) if kind == "operations" else count_parameters(shape).encoder


def half(shape: EncoderShape, axes: tuple[str, ...]) -> EncoderShape:
    fields = [SHAPE_FIELDS[axis] for axis in axes]
    return replace(shape, **{field: getattr(shape, field) // 2 for field in fields})


def build(shape: EncoderShape, axes: tuple[str, ...] = AXES, **kwargs) -> L0Module:
    return L0Module(shape, axes, half(shape, axes), **kwargs)


@torch.no_grad()
def fill(module: L0Module, log_alpha: float) -> None:
    for gates in module.log_alpha.values():
        gates.fill_(log_alpha)


def step(module: L0Module, gates: torch.optim.Optimizer) -> None:
    gates.zero_grad()
    module.lagrangian().backward()
    gates.step()
    module.clamp_()
    module.step += 1


def optimizer_for(module: L0Module, lr: float = 0.1) -> torch.optim.Optimizer:
    multipliers = [*module.lambda_1.parameters(), *module.lambda_2.parameters()]
    groups = [
        {"params": list(module.log_alpha.parameters())},
        {"params": multipliers, "maximize": True},
    ]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)


def test_gates_start_inside_the_clamp_with_a_spread_that_survives_a_step(tiny_shape, gated_axes):
    """LLM-Shearing's trap: a start outside the clamp makes all gates equal after one step."""
    module = build(tiny_shape, gated_axes, init_mean=3.0, init_std=0.25)
    sizes = {axis: tuple(gates.shape) for axis, gates in module.log_alpha.items()}
    assert sizes == {axis: GATES[axis] for axis in gated_axes}
    for log_alpha in module.log_alpha.values():
        assert ((log_alpha > LOG_ALPHA_MIN) & (log_alpha < LOG_ALPHA_MAX)).all()
    for _ in range(2):
        for log_alpha in module.log_alpha.values():
            assert log_alpha.unique().numel() == log_alpha.numel()
            assert float(log_alpha.detach().std()) > 0.1
        step(module, optimizer_for(module))


def test_noise_follows_from_seed_and_step(tiny_shape):
    def draw(seed: int, at: int) -> dict[str, torch.Tensor]:
        module = build(tiny_shape, seed=seed)
        module.log_alpha = nn.ParameterDict({a: torch.zeros(s) for a, s in GATES.items()})
        module.sample_masks()  # earlier draws leave no trace
        module.step = at
        torch.rand(7)  # nor does the global generator
        return vars(module.sample_masks())

    first = draw(0, 3)
    for axis in AXES:
        assert torch.equal(first[axis], draw(0, 3)[axis])
        assert not torch.equal(first[axis], draw(0, 4)[axis])
        assert not torch.equal(first[axis], draw(1, 3)[axis])


def test_an_axis_draws_the_same_whichever_others_are_gated(tiny_shape, gated_axes):
    every = build(tiny_shape).sample_masks()
    some = build(tiny_shape, gated_axes).sample_masks()
    for axis in AXES:
        expected = getattr(every, axis) if axis in gated_axes else None
        drawn = getattr(some, axis)
        assert drawn is None if expected is None else torch.equal(drawn, expected)


def test_gates_are_sampled_in_training_and_of_the_target_shape_in_evaluation(
    tiny_shape, gated_axes
):
    module = build(tiny_shape, gated_axes)
    assert not module.train()().is_binary()
    masks = module.eval()()
    assert masks.is_binary()
    target = half(tiny_shape, gated_axes)
    for axis in AXES:
        z = getattr(masks, axis)
        if axis not in gated_axes:
            assert z is None
        else:
            assert (z.sum(-1) == getattr(target, SHAPE_FIELDS[axis])).all()


def test_deterministic_gates_now_follow_the_expected_number(tiny_shape):
    module = build(tiny_shape)
    with torch.no_grad():
        module.log_alpha["hidden"].fill_(THRESHOLD)  # half open
        module.log_alpha["layer"].fill_(-100.0)  # none open: one is kept all the same
    masks = module.deterministic_masks(at_target=False)
    assert masks.hidden.sum() == 16
    assert masks.layer.sum() == 1
    assert (masks.head.sum(-1) == 4).all()


def test_gradients_reach_every_gate_through_the_model(build_model, tiny_shape, batch):
    backbone, heads = build_model(tiny_shape, torch.float32)
    module = build(tiny_shape).train()
    mask = batch["attention_mask"]
    for module.step in range(60):  # a gate sampled at exactly 0 or 1 has no gradient in that step
        hidden = backbone(**batch, masks=module())
        dense = heads.dense_vecs(hidden, mask)
        (dense @ dense.T)[0, 1:].square().sum().backward()
    for axis, log_alpha in module.log_alpha.items():
        assert log_alpha.grad.isfinite().all()
        assert (log_alpha.grad != 0).all(), axis


@pytest.mark.parametrize(("log_alpha", "sparsity"), [(100.0, 0.0), (THRESHOLD, 0.5), (-100.0, 1.0)])
def test_expected_sparsity_of_uniform_gates(tiny_shape, log_alpha, sparsity):
    module = build(tiny_shape)
    module.expected_parameters().encoder.backward()
    assert all((gates.grad > 0).all() for gates in module.log_alpha.values())
    fill(module, log_alpha)
    expected = module.expected_sparsity()
    assert {name: s.numel() for name, s in expected.items()} == {
        "head": 4, "hidden": 1, "intermediate": 4, "layer": 1, "encoder": 1
    }  # fmt: skip
    for axis in AXES:
        torch.testing.assert_close(expected[axis], torch.full_like(expected[axis], sparsity))
    count = module.expected_parameters().encoder
    share = float(count) / count_parameters(tiny_shape).encoder
    assert 1.0 - float(expected["encoder"].detach()) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(("progress", "start"), [(0.0, 0.0), (0.25, 0.1), (1.0, 0.0)])
def test_lagrangian_is_its_formula(tiny_shape, progress, start):
    module = build(tiny_shape, start_sparsity=start)
    module.warmup_progress = progress
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    with torch.no_grad():
        for axis, log_alpha in module.log_alpha.items():
            log_alpha.copy_(2.0 * torch.randn(log_alpha.shape, generator=generator))
            for multiplier in (module.lambda_1[axis], module.lambda_2[axis]):
                multiplier.copy_(torch.randn(multiplier.shape, generator=generator))
            shift = (2.0 / 3.0) * np.log(0.1 / 1.1)
            p = 1.0 / (1.0 + np.exp(shift - log_alpha.double().numpy()))
            gap = np.atleast_1d(1.0 - p.mean(-1)) - (start + (0.5 - start) * progress)
            first, second = module.lambda_1[axis].numpy(), module.lambda_2[axis].numpy()
            total += (first * gap + second * gap**2).sum()
    assert float(module.lagrangian().detach()) == pytest.approx(total, rel=1e-5)


def test_a_start_beyond_the_target_is_the_target(tiny_shape):
    module = build(tiny_shape, start_sparsity=0.9)
    assert all(c.target == 0.5 for c in module.constraints().values())


@pytest.mark.parametrize(("log_alpha", "sign"), [(4.0, -1), (-6.0, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_multipliers_ascend(tiny_shape, log_alpha, sign, kind):
    """``s < t`` pushes lambda_1 down, so that -lambda_1 * s rewards sparsity; lambda_2 grows."""
    module = L0Module(tiny_shape, AXES, **aim(kind, tiny_shape))
    module.warmup_progress = 1.0
    fill(module, log_alpha)
    step(module, optimizer_for(module))
    for name in module.lambda_1:
        assert (module.lambda_1[name].sign() == sign).all()
        assert (module.lambda_2[name] > 0).all()


def train(module: L0Module, steps: int = 400, warmup: int = 200) -> None:
    optimizer = optimizer_for(module)
    for index in range(steps):
        module.warmup_progress = min(1.0, index / warmup)
        step(module, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_every_subset_reaches_its_target(tiny_shape, gated_axes, kind):
    """Texts of 200 tokens are so long that attention takes half of the operations."""
    encoder = count_parameters(tiny_shape).encoder
    target, names = {
        "shape": ({"target": half(tiny_shape, gated_axes)}, set(gated_axes)),
        "parameters": ({"target_parameters": 0.8 * encoder}, {"encoder"}),
        "operations": ({"target_speedup": 1.25, "target_length": 200}, {"operations"}),
    }[kind]
    module = L0Module(tiny_shape, gated_axes, **target)
    train(module)
    assert set(module.distances()) == names
    assert max(module.distances().values()) < 0.02
    if kind == "parameters":
        found = float(module.expected_parameters().encoder)
        assert found == pytest.approx(0.8 * encoder, rel=0.025)
    elif kind == "operations":
        operations = expected_operations(tiny_shape, module.open_probabilities(), 200)
        expected = forward_flops(tiny_shape, [200]) / 1.25
        assert float(operations.detach()) == pytest.approx(expected, rel=0.025)


def test_binarization_is_the_distance_to_the_cut_of_this_moment(tiny_shape):
    target = replace(half(tiny_shape, AXES), intermediate_size=16)
    module = L0Module(tiny_shape, AXES, target, binarization=3.0, init_std=0.0)
    chance = float(torch.sigmoid(torch.tensor(1.0)))
    fill(module, THRESHOLD + 1.0)
    assert module.binarization_loss() == 0.0  # the warm-up is not over
    module.binarization_progress = 0.5
    # All alike: the target's share of a row is 1 - p from the cut, the rest p.
    rows, kept = {"layer": 1, "hidden": 1, "head": 4, "intermediate": 4}, {"intermediate": 0.25}
    expected = 0.0
    for axis, count in rows.items():
        share = kept.get(axis, 0.5)
        expected += count * (share * (1 - chance) + (1 - share) * chance)
    assert float(module.binarization_loss()) == pytest.approx(3.0 * 0.5**3 * expected)


@pytest.mark.parametrize("kind", KINDS)
def test_binarized_gates_end_binary_and_at_the_target(tiny_shape, kind):
    gaps, distances = {}, {}
    target = aim(kind, tiny_shape)
    for weight in (0.0, 100.0):
        module = L0Module(tiny_shape, AXES, binarization=weight, init_std=1.0, **target)
        optimizer = optimizer_for(module)
        for index in range(300):
            module.warmup_progress = min(1.0, index / 100)
            module.binarization_progress = max(0.0, (index - 100) / 200)
            optimizer.zero_grad()
            (module.lagrangian() + module.binarization_loss()).backward()
            optimizer.step()
            module.clamp_()
        distances[weight] = distances_to_binary(module.open_probabilities())["all"]
        gaps[weight] = max(module.distances().values())
    assert distances[100.0] < 0.005 < 0.05 < distances[0.0]
    # With a budget the shape that can be exported is that far from it.
    share = cost(kind, module.realised_shape()) / cost(kind, tiny_shape)
    assert gaps[100.0] < 0.005 + (0.0 if kind == "shape" else abs(share - 0.5))


def test_state_dict_carries_gates_and_multipliers(tiny_shape):
    module, other = build(tiny_shape), build(tiny_shape, seed=9)
    train(module, steps=3)
    other.load_state_dict(module.state_dict(), strict=True)
    other.warmup_progress = module.warmup_progress
    assert torch.equal(other.lagrangian(), module.lagrangian())
    expected = {f"{k}.{a}" for k in ("log_alpha", "lambda_1", "lambda_2") for a in AXES}
    assert set(module.state_dict()) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["head", "width"], r"\['head', 'width'\] must name one or more.*remove width"),
        ([], r"pruning_modules \[\] must name one or more.*name at least one"),
        (["layer"], "num_attention_heads 2 differs from the source's 4, but 'head' is not in"),
    ],
)
def test_axes_that_do_not_fit_are_refused(tiny_shape, target_shape, names, message):
    with pytest.raises(ValueError, match=message):
        L0Module(tiny_shape, names, target_shape)


@pytest.mark.parametrize(
    "kinds", [KINDS, KINDS[:2], KINDS[1:], KINDS[::2], (), 1.0, 0.5, float("nan")]
)
def test_other_than_one_target_and_a_speedup_that_is_none_are_refused(tiny_shape, kinds):
    targets, message = {}, "exactly one of a target shape, a parameter budget"
    if isinstance(kinds, float):
        targets, message = {"target_speedup": kinds}, r"_speedup .* is not above 1: .* To fix, set"
    else:
        for kind in kinds:
            targets |= aim(kind, tiny_shape)
    with pytest.raises(ValueError, match=message):
        L0Module(tiny_shape, AXES, **targets)


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_that_keeps_its_size_is_refused(tiny_shape, axis):
    others = tuple(a for a in AXES if a != axis)
    with pytest.raises(ValueError, match=f"'{axis}' is gated but the target keeps"):
        L0Module(tiny_shape, AXES, half(tiny_shape, others))


@pytest.mark.parametrize(
    ("named", "density"),
    [
        *[(named, d) for named in (AXES, ("layer", "intermediate")) for d in (0.25, 0.5, 0.75)],
        # Attention alone is a third of the encoder.
        *[(("intermediate",), d) for d in (0.5, 0.75)],
    ],
)
def test_realised_shape_meets_the_budget(density, named):
    budget = density * count_parameters(MIDDLE).encoder
    module = L0Module(MIDDLE, named, target_parameters=budget)
    shape = module.realised_shape()
    assert count_parameters(shape).encoder == pytest.approx(budget, rel=0.005)
    assert shape.hidden_size == shape.num_attention_heads * shape.head_dim
    fixed = [f for a, f in SHAPE_FIELDS.items() if a not in named]
    assert [getattr(shape, f) for f in fixed] == [getattr(MIDDLE, f) for f in fixed]
    masks = module.deterministic_masks()
    for axis in named:
        assert (getattr(masks, axis).sum(-1) == getattr(shape, SHAPE_FIELDS[axis])).all()


@pytest.mark.parametrize("named", [AXES, ("layer", "intermediate")])
@pytest.mark.parametrize("speedup", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("length", [16, 512])
def test_realised_shape_meets_the_speedup(speedup, length, named):
    module = L0Module(MIDDLE, named, target_speedup=speedup, target_length=length)
    shape = module.realised_shape()
    operations = forward_flops(shape, [length])
    assert operations == pytest.approx(forward_flops(MIDDLE, [length]) / speedup, rel=0.005)
    assert shape.hidden_size == shape.num_attention_heads * shape.head_dim


def test_realised_shape_is_the_nearest_and_the_one_that_the_gates_prefer():
    encoder = count_parameters(MIDDLE).encoder  # layers alone come in sixths
    module = L0Module(MIDDLE, ["layer"], target_parameters=0.55 * encoder)
    assert module.realised_shape() == replace(MIDDLE, num_hidden_layers=3)
    budget = 0.5 * count_parameters(MIDDLE).encoder
    candidates = shapes_near_budget(MIDDLE, frozenset(AXES), budget)
    assert len(candidates) > 3
    module = L0Module(MIDDLE, AXES, target_parameters=budget)
    for shape in candidates:
        with torch.no_grad():
            for axis, log_alpha in module.log_alpha.items():
                log_alpha.fill_(-4.0)[..., -getattr(shape, SHAPE_FIELDS[axis]) :] = 3.0
        assert module.realised_shape() == shape


@pytest.mark.parametrize("kind", KINDS)
def test_binarization_opens_what_the_cut_keeps_and_closes_the_rest(tiny_shape, kind):
    target = aim(kind, tiny_shape)
    module = L0Module(tiny_shape, AXES, binarization=1.0, init_mean=0.0, init_std=1.0, **target)
    module.binarization_progress = 1.0
    module.binarization_loss().backward()
    cut = module.deterministic_masks()
    for axis, gates in module.log_alpha.items():
        # Descent goes against the gradient.
        assert torch.equal(gates.grad < 0, getattr(cut, axis) == 1)
        assert (gates.grad != 0).all()
