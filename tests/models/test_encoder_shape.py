"""Parameter counts against real modules; exportable shapes against a search of every shape."""

import math
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bge_pruning.models.encoder_shape import (
    YAML_NAMES,
    EncoderShape,
    ParameterCount,
    check_exportable,
    count_parameters,
    expected_operations,
    expected_parameters,
    forward_flops,
    layer_parameters,
    outer_parameters,
)
from bge_pruning.models.shape_choice import exportable_shapes, shapes_near_budget
from bge_pruning.models.structural_pruning import SHAPE_FIELDS

ALL = frozenset({"head", "hidden", "intermediate", "layer"})
# No size is a multiple of another, so that none can stand in for it.
SOURCE = EncoderShape(
    hidden_size=30,
    num_attention_heads=5,
    num_hidden_layers=3,
    intermediate_size=77,
    vocab_size=41,
    head_dim=6,
    max_position_embeddings=19,
    type_vocab_size=2,
    colbert_dim=13,
)
fast = settings(max_examples=40, deadline=None, derandomize=True)
sizes = st.integers(1, 40)
AXES = [ALL, frozenset()] + [
    frozenset(names.split())
    for names in ("layer", "intermediate", "layer intermediate", "head hidden", "head intermediate")
]
GATES = {"head": (4, 4), "hidden": (32,), "intermediate": (4, 64), "layer": (4,)}


def cut_to(source: EncoderShape, layers: int, heads: int, units: int) -> EncoderShape:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": units}
    return replace(source, hidden_size=heads * source.head_dim, **sizes)


def numel(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@fast
@given(hidden=sizes, heads=sizes, units=sizes, head_dim=sizes)
def test_layer_parameters_are_those_of_its_modules(hidden, heads, units, head_dim):
    inner = heads * head_dim
    ends = [*[(hidden, inner)] * 3, (inner, hidden), (hidden, units), (units, hidden)]
    with torch.device("meta"):
        modules = [nn.Linear(*pair) for pair in ends] + [nn.LayerNorm(hidden) for _ in range(2)]
    assert layer_parameters(hidden, heads, units, head_dim) == numel(*modules)


def hugging_face_count(shape: EncoderShape) -> ParameterCount:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    names = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size"
    names = [*names.split(), "max_position_embeddings", "type_vocab_size"]
    config = XLMRobertaConfig(**{name: getattr(shape, name) for name in names})
    with torch.device("meta"):
        model = XLMRobertaModel(config, add_pooling_layer=shape.pooler)
        heads = [nn.Linear(shape.hidden_size, shape.colbert_dim)] if shape.colbert_dim else []
        heads += [nn.Linear(shape.hidden_size, 1)] if shape.sparse_head else []
    pooler = [model.pooler] if shape.pooler else []
    return ParameterCount(
        *(numel(*m) for m in ([model.encoder], [model.embeddings], pooler, heads))
    )


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("sparse_head", [True, False])
@pytest.mark.parametrize("colbert_dim", [0, 13])
def test_count_is_hugging_faces(pooler, sparse_head, colbert_dim):
    shape = replace(SOURCE, pooler=pooler, sparse_head=sparse_head, colbert_dim=colbert_dim)
    assert count_parameters(shape) == hugging_face_count(shape)
    c = count_parameters(shape)
    assert outer_parameters(shape.hidden_size, shape) == (c.embeddings, c.pooler, c.heads)


def test_bge_m3_and_the_plans_example(bge_m3_shape):
    count = count_parameters(bge_m3_shape)
    assert layer_parameters(1024, 16, 4096, 64) == 12_596_224
    assert count == hugging_face_count(bge_m3_shape)
    assert (count.encoder, count.embeddings) == (302_309_376, 264_395_776)
    assert count.total - count.heads == 567_754_752
    small = cut_to(bge_m3_shape, 18, 12, 3072)
    check_exportable(small, bge_m3_shape)
    assert count_parameters(small).encoder == hugging_face_count(small).encoder
    assert round(count_parameters(small).encoder / 1e6, 1) == 127.6
    parts = {"encoder": 1, "embeddings": 20, "pooler": 300, "heads": 4000}
    assert ParameterCount(**parts).as_dict() == {**parts, "total": 4321}
    assert SOURCE.describe() == "3 layers, hidden 30, 5 heads, intermediate 77"


@pytest.mark.parametrize(("field", "name"), YAML_NAMES.items())
@pytest.mark.parametrize(("size", "nearest"), [(-3, 1), (0, 1), (99, None)])
def test_a_size_out_of_range_is_refused(field, name, size, nearest):
    limit = getattr(SOURCE, field)
    message = (
        rf"^target {name} {size} is not in \[1, {limit}\], the source's size\. "
        rf"To fix, set {name} to {nearest or limit} or another size in range\.$"
    )
    with pytest.raises(ValueError, match=message):
        check_exportable(replace(SOURCE, **{field: size}), SOURCE)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"hidden_size": 20, "num_attention_heads": 4},
            r"^num_attention_heads 4 with head_dim 6 needs d_model 24, not 20: transformers could "
            r"not load the result\. To fix, set d_model=18 with n_heads=3 or d_model=24 with "
            r"n_heads=4\.$",
        ),
        # The product fits, but no head of the source has this size.
        ({"head_dim": 3, "hidden_size": 15}, r"head_dim 3.*source.*6.*To fix"),
    ],
)
def test_hidden_sizes_and_heads_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_exportable(replace(SOURCE, **sizes), SOURCE)


@pytest.mark.parametrize(("hidden", "heads"), [(1, 1), (5, 5), (29, 5), (30, 1), (18, 2), (7, 3)])
def test_every_proposed_shape_can_be_exported(hidden, heads):
    with pytest.raises(ValueError, match="To fix, set") as error:
        check_exportable(replace(SOURCE, hidden_size=hidden, num_attention_heads=heads), SOURCE)
    fix = str(error.value).split("To fix")[1]
    proposed = [(int(h), int(a)) for h, a in re.findall(r"d_model=(\d+) with n_heads=(\d+)", fix)]
    for h, a in proposed:
        check_exportable(replace(SOURCE, hidden_size=h, num_attention_heads=a), SOURCE)
    # The two around the wanted hidden size (down to one head), and the one of the wanted heads.
    nearest = {max(1, hidden // 6), math.ceil(hidden / 6), heads}
    assert proposed == [(6 * a, a) for a in sorted(nearest)]


def every_shape(axes: frozenset[str], multiple_of: int) -> list[EncoderShape]:
    """All that these axes can reach, with heads and hidden size tied."""
    full = SOURCE.intermediate_size
    layers = range(1, 4) if "layer" in axes else [3]
    heads = range(1, 6) if {"head", "hidden"} <= axes else [5]
    units = [full]
    if "intermediate" in axes:
        units = sorted({*range(multiple_of, full + 1, multiple_of), full})
    return [cut_to(SOURCE, *sizes) for sizes in product(layers, heads, units)]


def distance(shape: EncoderShape, budget: float) -> float:
    return abs(count_parameters(shape).encoder - budget)


@pytest.mark.parametrize("moves", AXES, ids=lambda axes: "-".join(sorted(axes)) or "none")
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.83, 1.0])
def test_exportable_shapes_are_the_best_of_each_depth_and_width(moves, density):
    budget = density * count_parameters(SOURCE).encoder
    found = list(exportable_shapes(SOURCE, moves, budget, 7))
    candidates = every_shape(moves, 7)
    groups = {(s.num_hidden_layers, s.hidden_size): [] for s in candidates}
    for shape in candidates:
        groups[shape.num_hidden_layers, shape.hidden_size].append(distance(shape, budget))
    assert {(s.num_hidden_layers, s.hidden_size) for s in found} == set(groups)
    assert len(found) == len(groups)
    for shape in found:
        check_exportable(shape, SOURCE)
        assert shape in candidates
        best = min(groups[shape.num_hidden_layers, shape.hidden_size])
        assert distance(shape, budget) == pytest.approx(best)


@pytest.mark.parametrize("moves", AXES, ids=lambda axes: "-".join(sorted(axes)) or "none")
@pytest.mark.parametrize("density", [0.01, 0.3, 0.62, 0.9, 1.0])
def test_shapes_near_a_budget_are_within_the_tolerance_or_the_nearest(moves, density):
    budget = density * count_parameters(SOURCE).encoder
    found = shapes_near_budget(SOURCE, moves, budget, multiple_of=4)
    nearest = min(distance(shape, budget) for shape in every_shape(moves, 1))
    if nearest > 0.005 * budget:
        assert len(found) == 1
        assert distance(found[0], budget) == nearest
    for shape in found:
        check_exportable(shape, SOURCE)
        assert distance(shape, budget) <= max(0.005 * budget, nearest)
    places = [(shape.num_hidden_layers, shape.num_attention_heads) for shape in found]
    assert places == sorted(set(places))


def test_no_depth_is_left_out_for_its_units():
    """Half of 6 layers of 1536 units: 5 layers of 608, which is no multiple of 64."""
    source = EncoderShape(384, 12, 6, 1536, vocab_size=9, head_dim=32)
    found = shapes_near_budget(source, ALL, count_parameters(source).encoder / 2)
    units = {s.num_hidden_layers: s.intermediate_size for s in found if s.hidden_size == 384}
    assert units == {3: 1536, 4: 960, 5: 608, 6: 384}


@pytest.mark.parametrize(("tolerance", "units"), [(0.05, 64), (0.02, 60), (0.005, 61)])
def test_the_granularity_is_halved_only_as_far_as_needed(tolerance, units):
    # From a layer of 61 units, 64 are 3.9 % away and 60, the next multiple of 4, 1.3 %.
    source = EncoderShape(6, 1, 1, 100, vocab_size=9, head_dim=6)
    budget = layer_parameters(6, 1, 61, 6)
    moves = frozenset({"intermediate"})
    (shape,) = shapes_near_budget(source, moves, budget, multiple_of=32, tolerance=tolerance)
    assert shape.intermediate_size == units


@pytest.mark.parametrize("budget", [25_702, 1e12, float("inf"), 0, -1, float("nan")])
def test_a_budget_of_nothing_or_above_the_source_is_refused(budget):
    fix = "lower" if budget > 0 else "above 0"  # lower would not fix it
    message = (
        rf"^a budget of {re.escape(f'{budget:,.0f}')} encoder parameters is not in \(0, 25,701\], "
        r"the source's encoder\. To fix, set l0_module\.target_parameters or "
        rf"l0_module\.target_density {fix}\.$"
    )
    with pytest.raises(ValueError, match=message):
        shapes_near_budget(SOURCE, ALL, budget)


def test_operations_of_texts():
    """Two for each weight and token, and four times the attention's products, layer by layer."""
    layer = layer_parameters(30, 5, 77, 6)
    expected = 3 * (2 * layer * (3 + 5) + 4 * 30 * (9 + 25))
    assert forward_flops(SOURCE, [3, 5]) == expected


@pytest.mark.parametrize("length", [1, 50, 3000])
def test_at_binary_gates_expected_counts_are_those_of_the_shape(tiny_shape, gated_axes, length):
    open_half = {}
    for axis in gated_axes:
        open_half[axis] = torch.ones(GATES[axis])
        open_half[axis][..., : GATES[axis][-1] // 2] = 0.0
    fields = [SHAPE_FIELDS[axis] for axis in gated_axes]
    shape = replace(tiny_shape, **{field: getattr(tiny_shape, field) // 2 for field in fields})
    operations = expected_operations(tiny_shape, open_half, length)
    assert float(operations) == pytest.approx(forward_flops(shape, [length]), rel=1e-6)
    found = expected_parameters(tiny_shape, open_half).as_dict()
    for part, count in count_parameters(shape).as_dict().items():
        assert float(found[part]) == pytest.approx(count, rel=1e-6), part
