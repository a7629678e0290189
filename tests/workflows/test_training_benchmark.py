"""The benchmark of training on the tiny model: what is measured, and what fits into memory."""

from itertools import product

import numpy as np
import pytest
import torch

from bge_pruning.config.load import ConfigError
from bge_pruning.datasets.embedding_dataset import build_tokenizer, tokenize
from bge_pruning.evaluation.random_model import random_base_model
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.reports.efficiency_table import LIMITS, USUAL
from bge_pruning.utils.model_analysis import measure_peak_bytes
from bge_pruning.utils.records import CACHED, COMPILED, GATES, PLAIN, TEACHER, TRAININGS
from bge_pruning.workflows import training_benchmark
from bge_pruning.workflows.training_batches import FIXED, GROUPED, RANDOM, make_trainings
from bge_pruning.workflows.training_benchmark import (
    MARGIN,
    MemoryNeed,
    StepCost,
    load_model,
    measure_flops,
    measure_training,
    summarise,
)

KINDS = (FIXED, RANDOM, GROUPED)
GB = 1e9
BGE_M3 = EncoderShape(1024, 16, 24, 4096, 250_002, 64, 8194, colbert_dim=1024)


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
    assert_measured(found, USUAL, 3)
    assert list(found["ratios"]) == list(KINDS)
    for ratios in found["ratios"].values():
        assert list(ratios) == [GATES, TEACHER, CACHED]
        assert all(low <= median <= high for low, median, high in ratios.values())
    assert list(found["reading"]) == list(KINDS)
    assert list(found["throughput"]) == [RANDOM, GROUPED]
    assert found["limits"] == LIMITS | {"throughput": 1.5}
    assert lines[0] == "fixed length: 3 steps of plain, gates, teacher, cached"


def cost(training: str, kind: str, seconds: list[float]) -> StepCost:
    data = [0.2, 0.1, 0.2] if training == CACHED else [0.1] * 3
    return StepCost(training, kind, seconds, data, [100] * 3, 0.0, 7.0, 1)


@pytest.mark.parametrize(
    ("names", "ratios", "throughput"),
    [
        ((PLAIN,), [], False),
        ((PLAIN, GATES), [GATES], True),
        ((GATES, CACHED), [CACHED], False),
        ((PLAIN, TEACHER), [], False),
    ],
)
def test_ratios_of_what_was_measured(names, ratios, throughput):
    found = summarise([cost(name, kind, [1.0] * 3) for kind in KINDS for name in names], 2.0)
    assert [list(kind) for kind in found["ratios"].values()] == [ratios] * 3
    assert bool(found["throughput"]) == throughput
    assert bool(found["reading"]) == (CACHED in ratios)


def test_ratios_are_medians_on_the_same_batch():
    seconds = {PLAIN: [1.0, 2.0, 4.0], GATES: [1.1, 2.4, 4.2]}
    seconds |= {TEACHER: [2.2, 3.6, 4.2], CACHED: [1.1, 3.6, 4.41]}
    found = summarise([cost(n, k, s) for k in KINDS for n, s in seconds.items()], 2.0)
    assert found["ratios"][FIXED][GATES] == pytest.approx([1.075, 1.1, 1.15])
    assert found["ratios"][FIXED][TEACHER][1] == pytest.approx(1.5)
    assert found["ratios"][FIXED][CACHED][1] == pytest.approx(1.05)
    reading = [0.05 / 4.2, 0.1 / 4.2, 0.05 / 4.2 + 0.05 / 1.1]
    assert found["reading"][RANDOM] == pytest.approx(reading)
    assert found["throughput"][GROUPED] == pytest.approx(7.0 / 7.7)
    assert found["costs"][0]["median_seconds"] == 2.0
    assert found["costs"][0]["utilisation"] == pytest.approx(7.0 / 7.0 / 2.0)
    assert found["costs"][0]["data_share"] == pytest.approx(0.3 / 7.0)


def test_what_does_not_fit_is_not_built(base, token_texts, monkeypatch):
    monkeypatch.setattr(training_benchmark.model_analysis, "free_bytes", lambda device: 1)
    monkeypatch.setattr(training_benchmark, "make_trainings", None)
    with pytest.raises(ValueError, match=r"4 trainings \(plain, .* and 0\.0 GB are free\. To fix"):
        measure_training(base, token_texts, 8, 12, 3)


def test_the_memory_of_the_model_counts_as_free(base, token_texts, monkeypatch):
    """It becomes the last training's."""
    seen = []
    monkeypatch.setattr(training_benchmark.model_analysis, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(MemoryNeed, "check", lambda *given: seen.extend(given))
    found = measure_training(base, token_texts, 8, 12, 2, names=(PLAIN,))
    assert_measured(found, (PLAIN,), 2)
    need, names, free = seen
    parameters = sum(p.numel() for m in (base.backbone, base.heads) for p in m.parameters())
    assert (need.shape, need.half, names) == (base.shape, False, (PLAIN,))
    assert free == 1000 + 4 * parameters
    assert 8 * 3 <= need.tokens <= need.padded <= 8 * 20


def test_a_folder_or_random_weights_of_a_configuration(tiny_yaml, model_folder):
    model = load_model(str(tiny_yaml), ["a red dog", "the  dog sings"])
    assert (model.shape.hidden_size, model.shape.num_hidden_layers) == (32, 4)
    tokenizer = build_tokenizer(model.tokenizer_files["tokenizer.json"], 16)
    assert tokenize(["the red dog sings"], tokenizer).lengths.tolist() == [6]
    assert load_model(str(model_folder), ["a dog"]).name == str(model_folder)
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file\. To fix, check the path"):
        load_model("none.yaml", ["a dog"])


@pytest.mark.parametrize("autocast", [False, True])
def test_peak_of_a_product(autocast):
    assert measure_flops("cpu", autocast) > 1e7


def test_bge_m3_beside_plain_fine_tuning_fits_24_gb():
    need = MemoryNeed(BGE_M3, 256, 256, half=False)
    assert 17 * GB < need.total((PLAIN, GATES)) < 18 * GB
    need.check((PLAIN, GATES), 20 * GB)
    assert need.total(USUAL) > 24 * GB


def test_padding_counts_for_plain_and_compiled_layers():
    tight, wide = (MemoryNeed(BGE_M3, 4000, padded, half=False) for padded in (4000, 16000))
    for name in (PLAIN, COMPILED):
        assert wide.total((name,)) > tight.total((name,))
    assert wide.total((GATES,)) == tight.total((GATES,))


@pytest.mark.parametrize(
    ("names", "sizes", "free", "message"),
    [
        (
            USUAL,
            (256, 256),
            20,
            r"4 trainings \(plain, gates, teacher, cached\) of this model would take about 35\.\d "
            r"GB, and 20\.0 GB are free\. To fix, pass --trainings plain gates \(17\.5 GB\)\.$",
        ),
        (
            (GATES, CACHED),
            (6000, 8000),
            20,
            r"2 trainings \(gates, cached\) .* pass --trainings gates \(\d+\.\d GB\), or lower --ba"
            r"tch-size, --max-length and --fixed-length to 2,000 tokens a batch \(now 8,000\)\.$",
        ),
        ((PLAIN,), (256, 256), 2, r"1 training \(plain\) .* To fix, choose a smaller model, or a"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(names, sizes, free, message):
    with pytest.raises(ValueError, match=message):
        MemoryNeed(BGE_M3, *sizes, half=False).check(names, free * GB)


@pytest.mark.parametrize("name", [PLAIN, GATES, TEACHER])
def test_the_estimate_is_near_the_measurement(name):
    """Of a step beside weights, moments and gradients, which are known."""
    shape = EncoderShape(128, 4, 4, 512, 500, 32, 130, colbert_dim=128)
    lengths = torch.tensor([100, 60, 128, 100, 20, 90, 128, 110] * 2)
    mask = (torch.arange(128) < lengths[:, None]).long()
    ids = torch.randint(4, 500, mask.shape) * mask + (1 - mask)
    batch = {"input_ids": ids[:, None], "attention_mask": mask[:, None]}
    batch["teacher_dense_vecs"] = torch.nn.functional.normalize(torch.randn(16, 1, 128), dim=-1)
    training = make_trainings(random_base_model(shape, "random"), "cpu", False, (name,))[name]
    training.step(batch)
    found = measure_peak_bytes(lambda: training.step(batch))
    needed = MemoryNeed(shape, int(mask.sum()), mask.numel(), half=False).total((name,))
    kept = (16 if name == TEACHER else 12) * count_parameters(shape).total
    assert needed / MARGIN - kept == pytest.approx(found, rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_all_is_measured_on_the_gpu(base, token_texts, autocast):
    found = measure_training(base, token_texts, 8, 12, 3, "cuda", autocast, tuple(TRAININGS))
    assert_measured(found, TRAININGS, 3)
    assert all(cost["utilisation"] < 1 for cost in found["costs"])
