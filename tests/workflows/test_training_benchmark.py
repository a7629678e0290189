"""What the benchmark of training measures, on the tiny model."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from bge_pruning.config.load import ConfigError
from bge_pruning.datasets.embedding_dataset import build_tokenizer, tokenize
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.reports.efficiency_table import LIMITS, UNCOMPILED
from bge_pruning.utils.records import CACHED, GATES, PLAIN, TEACHER, TRAININGS
from bge_pruning.workflows import training_benchmark
from bge_pruning.workflows.training_batches import FIXED, GROUPED, RANDOM
from bge_pruning.workflows.training_benchmark import (
    StepCost,
    load_model,
    measure_flops,
    measure_training,
    summarise,
)

KINDS = (FIXED, RANDOM, GROUPED)


@pytest.fixture
def base(model_folder):
    return load_base_model(str(model_folder))


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setattr(training_benchmark, "CPU_PRODUCT", (128, 2))


def assert_measured(found, names, steps):
    costs = found["costs"]
    assert [(c["batches"], c["training"]) for c in costs] == list(product(KINDS, names))
    for cost in costs:
        for key in ("seconds", "data_seconds", "tokens"):
            assert len(cost[key]) == steps and min(cost[key]) > 0
        assert all(np.less(cost["data_seconds"], cost["seconds"]))
        assert cost["data_share"] == sum(cost["data_seconds"]) / sum(cost["seconds"])
        assert cost["peak_bytes"] > 0 and cost["utilisation"] > 0
        assert cost["tokens_per_second"] == sum(cost["tokens"]) / sum(cost["seconds"])
    padding = {cost["batches"]: cost["padding"] for cost in costs}
    assert padding[FIXED] == 0.0 < padding[GROUPED] < padding[RANDOM]
    assert found["peak_flops"] > 0


def test_all_is_measured(base, token_texts):
    lines = []
    found = measure_training(base, token_texts, 8, 12, 3, report=lines.append)
    assert_measured(found, UNCOMPILED, 3)
    assert list(found["ratios"]) == list(KINDS)
    for ratios in found["ratios"].values():
        assert list(ratios) == [GATES, TEACHER, CACHED]
        assert all(low <= median <= high for low, median, high in ratios.values())
    assert list(found["reading"]) == list(KINDS)
    assert list(found["throughput"]) == [RANDOM, GROUPED]
    assert found["limits"] == LIMITS | {"throughput": 1.5}
    assert lines[0] == "fixed length: 3 steps of plain, gates, teacher, cached"


@pytest.mark.parametrize(
    ("names", "ratios", "throughput"),
    [
        ((PLAIN,), [], False),
        ((PLAIN, GATES), [GATES], True),
        ((GATES, CACHED), [CACHED], False),
        ((PLAIN, TEACHER), [], False),
    ],
)
def test_ratios_of_what_was_measured(base, token_texts, names, ratios, throughput):
    found = measure_training(base, token_texts, 8, 12, 2, names=names)
    assert_measured(found, names, 2)
    assert [list(kind) for kind in found["ratios"].values()] == [ratios] * 3
    assert bool(found["throughput"]) == throughput
    assert bool(found["reading"]) == (CACHED in ratios)


def test_ratios_are_medians_on_the_same_batch():
    def cost(training: str, kind: str, seconds: list[float]) -> StepCost:
        data = [0.2, 0.1, 0.2] if training == CACHED else [0.1] * 3
        return StepCost(training, kind, seconds, data, [100] * 3, 0.0, 7.0, 1)

    seconds = {
        PLAIN: [1.0, 2.0, 4.0],
        GATES: [1.1, 2.4, 4.2],
        TEACHER: [2.2, 3.6, 4.2],
        CACHED: [1.1, 3.6, 4.41],
    }
    found = summarise([cost(n, k, s) for k in KINDS for n, s in seconds.items()], 2.0)
    assert found["ratios"][FIXED][GATES] == pytest.approx([1.075, 1.1, 1.15])
    assert found["ratios"][FIXED][TEACHER][1] == pytest.approx(1.5)
    assert found["ratios"][FIXED][CACHED][1] == pytest.approx(1.05)
    assert found["reading"][RANDOM] == pytest.approx(
        [0.05 / 4.2, 0.1 / 4.2, 0.05 / 4.2 + 0.05 / 1.1]
    )
    assert found["throughput"][GROUPED] == pytest.approx(7.0 / 7.7)
    assert found["costs"][0]["median_seconds"] == 2.0
    assert found["costs"][0]["utilisation"] == pytest.approx(7.0 / 7.0 / 2.0)
    assert found["costs"][0]["data_share"] == pytest.approx(0.3 / 7.0)


def test_what_does_not_fit_is_not_built(base, token_texts, monkeypatch):
    monkeypatch.setattr(training_benchmark, "free_bytes", lambda device: 1)
    monkeypatch.setattr(training_benchmark, "make_trainings", None)
    with pytest.raises(ValueError, match=r"4 trainings \(plain, .* and 0\.0 GB are free\. To fix"):
        measure_training(base, token_texts, 8, 12, 3)


def test_the_memory_of_the_model_counts_as_free(base, token_texts, monkeypatch):
    """It becomes the last training's."""
    seen = {}
    monkeypatch.setattr(training_benchmark, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(training_benchmark, "check_memory", lambda *given: seen.update(all=given))
    measure_training(base, token_texts, 8, 12, 1, names=(PLAIN,))
    shape, names, tokens, padded, half, free = seen["all"]
    parameters = sum(p.numel() for m in (base.backbone, base.heads) for p in m.parameters())
    assert (shape, names, half, free) == (base.shape, (PLAIN,), False, 1000 + 4 * parameters)
    assert 8 * 3 <= tokens <= padded <= 8 * 20


def test_random_weights_of_a_configuration(tiny_yaml):
    model = load_model(str(tiny_yaml), ["a red dog", "the  dog sings"])
    assert (model.shape.hidden_size, model.shape.num_hidden_layers) == (32, 4)
    tokenizer = build_tokenizer(model.tokenizer_files["tokenizer.json"], 16)
    assert tokenize(["the red dog sings"], tokenizer).lengths.tolist() == [6]


def test_a_folder_is_loaded(model_folder):
    assert load_model(str(model_folder), ["a dog"]).name == str(model_folder)


def test_a_configuration_that_is_not_there():
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file\. To fix, check the path"):
        load_model("none.yaml", ["a dog"])


@pytest.mark.parametrize("autocast", [False, True])
def test_peak_of_a_product(autocast):
    assert measure_flops("cpu", autocast) > 1e7


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_all_is_measured_on_the_gpu(base, token_texts, autocast):
    found = measure_training(base, token_texts, 8, 12, 3, "cuda", autocast, tuple(TRAININGS))
    assert_measured(found, TRAININGS, 3)
    assert all(cost["utilisation"] < 1 for cost in found["costs"])
