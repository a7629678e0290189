"""What is logged about the gates, and when."""

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer.core import State, Time, Timestamp
from composer.devices import DeviceCPU
from composer.utils import dist

from bge_pruning.callbacks.pruning_callback import (
    GateMapCallback,
    PruningCallback,
    compute_pruning_metrics,
)
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters, expected_parameters
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.structural_pruning import SHAPE_FIELDS
from tests.common.trainings import logged, read_metrics

SHAPE = EncoderShape(
    32, 4, 4, 64, 99, head_dim=8, max_position_embeddings=80, sparse_head=True, colbert_dim=24
)
HALF = replace(
    SHAPE, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32
)
SIZES = {"head": 4, "hidden": 32, "intermediate": 64, "layer": 4}
BUDGET = 18_000


def build(axes: tuple[str, ...], target: EncoderShape | None, mean: float = -1.0) -> L0Module:
    """Gates and multipliers all over the place, in the middle of the warm-up."""
    budget = None if target else BUDGET
    module = L0Module(SHAPE, axes, target, budget, start_sparsity=0.1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(2.0 * torch.randn(parameter.shape, generator=generator) + mean)
    module.warmup_progress = 0.25
    return module


@dataclass(frozen=True)
class Case:
    module: L0Module
    constrained: tuple[str, ...]


def make_case(name: str) -> Case:
    every = ("head", "hidden", "intermediate", "layer")
    if name == "shape":
        return Case(build(every, HALF), every)
    if name == "some axes":
        some = ("intermediate", "layer")
        target = replace(SHAPE, intermediate_size=32, num_hidden_layers=2)
        return Case(build(some, target, mean=4.0), some)  # less is pruned than should be
    return Case(build(every, None), ("encoder",))


@pytest.fixture(params=["shape", "some axes", "budget"])
def case(request) -> Case:
    return make_case(request.param)


def probabilities(module: L0Module) -> dict[str, np.ndarray]:
    """P(z > 0) of equation 12 of Louizos et al."""
    shift = 2 / 3 * np.log(0.1 / 1.1)
    gates = {a: g.detach().double().numpy() for a, g in module.log_alpha.items()}
    found = {a: 1 / (1 + np.exp(shift - g)) for a, g in gates.items()}
    full = {"head": (4, 4), "hidden": 32, "intermediate": (4, 64), "layer": 4}
    return {axis: found.get(axis, np.ones(size)) for axis, size in full.items()}


def expected_metrics(case: Case) -> dict[str, float]:
    module, full = case.module, count_parameters(SHAPE).encoder
    p, masks = probabilities(module), module.deterministic_masks()
    kept = dict(SIZES)
    values = {}
    for axis in module.axes:
        kept[axis] = int(getattr(masks, axis).sum(-1).unique())
        values[f"expected_sparsity/{axis}"] = 1 - p[axis].mean()
        values[f"realised_sparsity/{axis}"] = 1 - kept[axis] / SIZES[axis]
        values[f"binary_distance/{axis}"] = np.minimum(p[axis], 1 - p[axis]).mean()
        values[f"open_share/{axis}"] = (p[axis] > 0.5).mean()
    counts = expected_parameters(SHAPE, {a: torch.from_numpy(q) for a, q in p.items()}).as_dict()
    counts = {part: float(count) for part, count in counts.items()}
    values |= {f"expected_parameters/{part}": count for part, count in counts.items()}
    values["expected_density"] = counts["encoder"] / full
    values["expected_sparsity/encoder"] = 1 - counts["encoder"] / full
    cut = replace(SHAPE, **{SHAPE_FIELDS[axis]: size for axis, size in kept.items()})
    values["realised_sparsity/encoder"] = 1 - count_parameters(cut).encoder / full
    for name in case.constrained:
        final = 1 - BUDGET / full if name == "encoder" else 0.5
        target = 0.1 + 0.25 * (final - 0.1)
        kept_rows = counts["encoder"] / full if name == "encoder" else p[name].mean(-1)
        values[f"target_sparsity/{name}"] = target
        values[f"distance/{name}"] = np.abs(1 - kept_rows - target).max()
        for multiplier in ("lambda_1", "lambda_2"):
            value = getattr(module, multiplier)[name].detach().numpy().mean()
            values[f"{multiplier}/{name}"] = value
    return {f"pruning/{key}": value for key, value in values.items()}


def test_every_key_has_the_right_value_and_logging_leaves_no_trace(case):
    expected = expected_metrics(case)
    metrics = compute_pruning_metrics(case.module)
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        assert type(metrics[key]) is float
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    before = {k: v.clone() for k, v in case.module.state_dict().items()}
    random = torch.random.get_rng_state()
    compute_pruning_metrics(case.module)
    assert all(torch.equal(v, before[k]) for k, v in case.module.state_dict().items())
    assert all(p.grad is None for p in case.module.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_the_docstrings_table_names_every_key_and_no_other():
    table = re.findall(r"^ *``(pruning/\S+)``", PruningCallback.__doc__, flags=re.MULTILINE)
    cases = [make_case(name) for name in ("shape", "some axes", "budget")]
    logged = {key for case in cases for key in compute_pruning_metrics(case.module)}
    axes = "|".join([*SIZES, "encoder"])
    for wildcard, names in (("<axis>", axes), ("<part>", "encoder|embeddings|pooler|heads|total")):
        table = [row.replace(wildcard, f"({names})") for row in table]
    for key in logged:
        assert any(re.fullmatch(row, key) for row in table), f"{key} is not in the table"
    for row in table:
        assert any(re.fullmatch(row, key) for key in logged), f"{row} is not logged"


@pytest.mark.parametrize(
    ("duration", "interval", "batches"),
    [("5ba", "2ba", [2, 4, 5]), ("4ba", "2ba", [2, 4]), ("7ba", "1ep", [5, 7])],
)
def test_logged_at_the_interval_and_at_the_end(duration, interval, batches, tmp_path, train_tiny):
    times = (f"max_duration={duration}", f"log_interval={interval}")
    run = train_tiny(tmp_path, *times, "eval_interval=3ep", "save_interval=3ep")
    assert list(logged(run, "pruning/lambda_1/hidden")) == batches


def test_a_run_without_gates_logs_nothing_of_them(tmp_path, train_tiny):
    run = train_tiny(tmp_path, "model.l0_module=null", "max_duration=2ba")
    assert not any(
        key.startswith("pruning/") for row in read_metrics(run) for key in row["metrics"]
    )
    assert all(row["metrics"] for row in read_metrics(run))


def test_every_rank_tells_its_loggers():
    callback = PruningCallback(make_case("shape").module, "1ba")
    logged = []
    state = State(torch.nn.Linear(1, 1), 0, "run", DeviceCPU(), max_duration="9ba")
    state.timestamp = Timestamp(batch=1)
    callback.batch_end(state, SimpleNamespace(log_metrics=logged.append))
    assert len(logged) == 1


@pytest.fixture
def callback():
    return GateMapCallback(L0Module(SHAPE, ("head", "layer"), None, 18_000), "4ba")


def at(batch: int) -> SimpleNamespace:
    """The end of a batch of a run of ten."""
    return SimpleNamespace(timestamp=Timestamp(batch=batch), max_duration=Time.from_batch(10))


def test_an_image_of_the_gates_at_evaluations_and_in_the_last_batch(callback, monkeypatch):
    drawn = []
    logger = SimpleNamespace(log_images=lambda image, **where: drawn.append((batch, image, where)))
    for batch in (1, 3, 4, 5, 9, 10):
        callback.batch_end(at(batch), logger)
    assert [batch for batch, *_ in drawn] == [4, 10]
    _, image, where = drawn[0]
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
    assert where == {"name": "gates", "channels_last": True, "use_table": False}
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    callback.batch_end(at(4), logger)
    assert len(drawn) == 2


@pytest.mark.usefixtures("failures_may_be_hidden")
def test_a_failure_does_not_end_the_training(callback, caplog):
    callback.batch_end(at(4), SimpleNamespace())
    assert "drawing the gates failed" in caplog.text
