"""Which models are measured in which runtimes, and which requests are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bge_pruning.config.load import ConfigError, load_config
from bge_pruning.evaluation.encoders import SentenceTransformerEncoder
from bge_pruning.evaluation.onnx_encoder import OnnxEncoder
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.export.onnx_export import export_onnx
from bge_pruning.reports.efficiency_table import render_efficiency
from bge_pruning.training.plan import build_plan
from bge_pruning.workflows import efficiency_benchmark
from bge_pruning.workflows.efficiency_benchmark import (
    Candidate,
    benchmark,
    check_request,
    choose_runtimes,
    find_candidates,
    open_models,
)

ALL = ("torch", "compile", "onnx")
TEXTS = ["the man plays", "a dog"]


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory):
    """The tiny model with its ONNX file."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    shutil.copytree(model_folder, folder)
    export_onnx(folder)
    return folder


def names(folder: Path) -> dict[str, Candidate]:
    return {"model": Candidate(str(folder))}


def test_models_and_configurations_by_name(tiny_yaml, model_folder, tmp_path):
    """A configuration is its target beside its source."""
    plan, name = build_plan(load_config([tiny_yaml])), str(tiny_yaml)
    target = Candidate(f"{name} (target, random weights)", plan.target)
    source = Candidate(f"{name} (source, random weights)", plan.source)
    assert find_candidates(name) == {"model": target, "baseline": source}
    assert find_candidates(name, name) == {"model": target, "baseline": target}
    folder = str(model_folder)
    assert find_candidates(folder) == {"model": Candidate(folder)}
    assert find_candidates(name, folder)["baseline"] == Candidate(folder)
    path = tmp_path / "plain.yaml"
    path.write_text(f"extends: {tiny_yaml}\nmodel: {{l0_module: null}}\n")
    with pytest.raises(ConfigError, match=r"plain\.yaml: prunes nothing .*To fix, name a conf"):
        find_candidates(str(path))


def test_runtimes_are_in_their_order(exported):
    folder, file = names(exported), names(exported / "onnx" / "model.onnx")
    assert choose_runtimes(folder, None) == ("torch",)
    assert choose_runtimes(folder, ["onnx", "compile", "onnx", "torch"]) == ALL
    assert choose_runtimes(file, None) == ("onnx",)
    assert choose_runtimes(file, ["onnx"]) == ("onnx",)
    message = r"model\.onnx runs in ONNX Runtime alone, and runtimes are onnx, torch\. To fix, pass"
    with pytest.raises(ValueError, match=message):
        choose_runtimes(file, ["onnx", "torch"])


NO_DTYPE = "dtype {} is not for the runtime onnx: .*To fix, leave --dtype or that"
NO_DEVICE = r"device {} cannot be used here \(.*To fix, use cpu"
DEVICES = ("tpu", "cuda:64", "mps", "meta")


@pytest.mark.parametrize(
    ("runtimes", "dtype", "device", "message"),
    [
        *((ALL, dtype, "cpu", NO_DTYPE.format(dtype)) for dtype in ("bf16", "fp16")),
        *((("torch",), "fp32", device, NO_DEVICE.format(device)) for device in DEVICES),
    ],
)
def test_what_cannot_be_measured_is_refused(runtimes, dtype, device, message, model_folder):
    with pytest.raises(ValueError, match=message):
        check_request(names(model_folder), runtimes, dtype, device)


def test_onnx_where_there_is_no_provider(model_folder, monkeypatch):
    monkeypatch.setattr(efficiency_benchmark.environment, "check_device", lambda _: None)
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    message = r"runtime onnx: the installed ONNX Runtime cannot run on cuda\. To fix, pass --device"
    with pytest.raises(ValueError, match=message):
        check_request(names(model_folder), ("onnx",), "fp32", "cuda")


def test_with_and_without_a_compiler(model_folder, monkeypatch):
    def fail(_):
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda function: function)
    check_request(names(model_folder), ("torch", "compile"), "bf16", "cpu")
    monkeypatch.setattr(torch, "compile", lambda _: fail)
    message = r"torch\.compile does not work on cpu \(no C\+\+ compiler\)\. To fix, install a C\+\+"
    with pytest.raises(ValueError, match=message):
        check_request(names(model_folder), ("compile",), "fp32", "cpu")


def test_one_model_for_every_runtime(model_folder, assert_same):
    before = sorted(model_folder.rglob("*"))
    with open_models(names(model_folder), ALL, "fp32", "cpu") as opened:
        assert tuple(opened) == ALL
        made = opened["onnx"]["model"]
        assert isinstance(made, OnnxEncoder) and made.folder != model_folder
        assert opened["torch"]["model"] is opened["compile"]["model"]
        vectors = [opened[name]["model"].encode(TEXTS).dense_vecs for name in ("torch", "onnx")]
        assert_same(*vectors, atol=1e-5)
    assert not made.folder.exists()
    assert sorted(model_folder.rglob("*")) == before


def test_an_onnx_file_that_is_there_is_taken(exported, monkeypatch):
    monkeypatch.setattr(efficiency_benchmark, "load_encoder", None)  # and nothing else loaded
    for name in (exported, exported / "onnx" / "model.onnx"):
        with open_models(names(name), ("onnx",), "fp32", "cpu") as opened:
            assert opened["onnx"]["model"].path == exported / "onnx" / "model.onnx"


def test_precision(model_folder):
    with open_models(names(model_folder), ("torch",), "bf16", "cpu") as opened:
        encoder = opened["torch"]["model"]
    assert isinstance(encoder, TextEncoder)
    assert {p.dtype for p in encoder.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in encoder.heads.parameters()} == {torch.bfloat16}


def test_random_weights_know_the_words_of_the_texts(tiny_yaml):
    with open_models(find_candidates(str(tiny_yaml)), ("torch",), "fp32", "cpu", TEXTS) as opened:
        model, baseline = opened["torch"].values()
    for encoder in (model, baseline):
        assert encoder.tokenize(TEXTS).lengths.tolist() == [5, 4]
    assert (model.dense_size, baseline.dense_size) == (24, 32)


def test_other_architectures(monkeypatch, model_folder):
    other = SentenceTransformerEncoder.__new__(SentenceTransformerEncoder)
    monkeypatch.setattr(efficiency_benchmark, "load_encoder", lambda _: other)
    message = r"is no XLM-R model, so its operations cannot be counted\. To fix, measure it with"
    with (
        pytest.raises(ValueError, match=message),
        open_models(names(model_folder), ("torch",), "fp32", "cpu"),
    ):
        pass


def test_the_whole_result(exported, tmp_path):
    candidates = find_candidates(str(exported / "onnx" / "model.onnx"), str(exported))
    result = benchmark(candidates, ("onnx",), "fp32", "cpu", [2], [5], (), 0.01)
    keys = "model baseline shapes parameters device dtype runtimes machine settings saturation"
    keys += " weight_bytes threads max_length too_long too_large load versions"
    assert list(result) == keys.split()
    json.dumps(result, allow_nan=False)
    (setting,) = result["settings"]
    assert (setting["runtime"], setting["ideal"]) == ("onnx", 1.0)
    assert setting["model"]["activation_bytes"] is None
    assert "onnxruntime" in result["versions"]
    assert result["shapes"]["model"] == "4 layers, hidden 32, 4 heads, intermediate 64"
    assert result["parameters"]["baseline"]["total"] > result["parameters"]["baseline"]["encoder"]
    assert str(exported) in render_efficiency(result)


@pytest.mark.gpu
def test_on_a_gpu(model_folder):
    candidates = find_candidates(str(model_folder), str(model_folder))
    runtimes = ("torch", "compile")
    result = benchmark(candidates, runtimes, "bf16", "cuda", [2], [16], TEXTS, 0.1)
    assert [(s["runtime"], s["length"]) for s in result["settings"]] == [
        (runtime, length) for runtime in runtimes for length in (16, "real")
    ]
    for setting in result["settings"]:
        assert setting["model"]["activation_bytes"] > 0
    assert result["machine"]["gpu"]
