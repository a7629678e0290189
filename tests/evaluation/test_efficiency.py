"""Speed beside the ideal: what is counted, what is left out, what noise forbids to claim."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from bge_pruning.evaluation import efficiency
from bge_pruning.evaluation.efficiency import (
    REAL,
    Setting,
    measure_efficiency,
    measure_setting,
    prepare,
)
from bge_pruning.evaluation.encoders import load_encoder
from bge_pruning.utils.efficiency_table import render_efficiency

TEXTS = ["the man plays a flute", "a dog", "the cat eats bread and the dog plays"]


@pytest.fixture
def encoder(model_folder):
    return load_encoder(str(model_folder))


@pytest.mark.parametrize("length", [6, REAL])
def test_a_setting(encoder, length):
    found = measure_setting(encoder, encoder, Setting(2, length), TEXTS, seconds=0.01)
    assert found["rounds"] >= efficiency.LEAST_ROUNDS
    assert found["ideal"] == 1.0
    assert 0.2 < found["speedup"]["median"] < 5.0
    assert found["share"] == found["speedup"]["median"]
    tokens = 6 * 2 if length == 6 else sum(encoder.tokenize(TEXTS).lengths)
    texts = 2 if length == 6 else 3
    rate = found["model"]["tokens_per_s"] / found["model"]["texts_per_s"]
    assert rate == pytest.approx(tokens / texts)
    assert found["model"]["activation_bytes"] > 0


def test_settings_and_what_is_left_out(encoder):
    found = measure_efficiency(encoder, None, [1, 2], [4, 10_000], TEXTS, 0.01)
    pairs = [(s["batch_size"], s["length"]) for s in found["settings"]]
    assert pairs == [(1, 4), (2, 4), (1, REAL), (2, REAL)]
    assert found["left_out"] == [10_000]
    assert "speedup" not in found["settings"][0]
    text = render_efficiency(found)
    assert "left out, beyond a model's limit: [10000] tokens" in text
    assert "speed-up" not in text


def setting(share: float, noisy: bool = False) -> dict:
    part = {
        "latency_ms": {"median": 2.0, "p95": 3.0},
        "texts_per_s": 16.0,
        "tokens_per_s": 2048.0,
        "gflops_per_token": 0.1,
        "activation_bytes": 2_000_000,
    }
    return {
        "batch_size": 32,
        "length": 128,
        "rounds": 5,
        "model": part,
        "baseline": part,
        "speedup": {"median": 2.0 * share, "quartiles": [1.5, 2.5]},
        "ideal": 2.0,
        "share": share,
        "noisy": noisy,
    }


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (setting(0.93), "32 texts of 128 tokens: 93% of the ideal speed-up, at least 90%"),
        (setting(0.85), "32 texts of 128 tokens: 85% of the ideal speed-up, below 90%"),
        (setting(0.93, noisy=True), "1 of 1 long settings are too noisy for a claim"),
    ],
)
def test_what_is_claimed(found, line):
    result = {
        "settings": [found],
        "left_out": [],
        "threads": 2,
        "weight_bytes": {"model": 1e6, "baseline": 2e6},
    }
    text = render_efficiency(result)
    assert line in text
    assert ("| noise |" in text) == found["noisy"]


def test_precision_and_compilation(encoder, monkeypatch):
    compiled = []
    monkeypatch.setattr(type(encoder.backbone), "compile", lambda self: compiled.append(self))
    assert prepare(encoder, "bf16", True) is encoder
    assert encoder.backbone.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert compiled == [encoder.backbone]


def test_onnx_beside_torch(model_folder, tmp_path):
    from bge_pruning.export.onnx_export import export_onnx

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    export_onnx(folder)
    onnx = load_encoder(str(folder / "onnx" / "model.onnx"))
    found = measure_setting(onnx, load_encoder(str(folder)), Setting(2, 5), (), 0.01)
    assert found["ideal"] == 1.0
    assert found["model"]["activation_bytes"] is None
    with pytest.raises(ValueError, match=r"an ONNX file has its own precision and runtime"):
        prepare(onnx, "bf16", False)


def test_other_architectures():
    other = SimpleNamespace(name="other")
    with pytest.raises(ValueError, match=r"other: is no XLM-R model.*To fix"):
        prepare(other, "fp32", False)
