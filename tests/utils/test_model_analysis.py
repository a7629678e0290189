import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import XLMRobertaModel

from bge_pruning.utils import model_analysis
from bge_pruning.utils.model_analysis import count_by_part, count_parameters, measure_speed


def test_counts_are_those_of_the_loaded_model(tiny_folder):
    model = XLMRobertaModel.from_pretrained(tiny_folder)
    counts = count_parameters(tiny_folder)
    for part in ("encoder", "embeddings", "pooler"):
        module = getattr(model, part)
        assert counts[part] == sum(value.numel() for value in module.parameters())
    assert counts["heads"] == 16 * 16 + 16 + 16 + 1
    assert counts["total"] == counts["heads"] + sum(p.numel() for p in model.parameters())
    assert list(counts) == ["encoder", "embeddings", "pooler", "heads", "total"]


def test_folder_without_heads_and_with_a_torch_file(tiny_folder, tmp_path):
    weights = load_file(tiny_folder / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    counts, full = count_parameters(tmp_path), count_parameters(tiny_folder)
    assert counts["heads"] == 0
    assert counts["total"] == full["total"] - full["heads"]


def test_position_buffer_is_no_parameter():
    sizes = {"embeddings.position_ids": 34, "embeddings.LayerNorm.bias": 16}
    assert count_by_part(sizes)["embeddings"] == 16


def test_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor pytorch"):
        count_parameters(tmp_path)


def test_unknown_key(tmp_path):
    save_file({"roberta.encoder.x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 weights belong to no part .*: roberta\.encoder\.x"):
        count_parameters(tmp_path)


def test_speed_has_every_figure(tiny_model):
    speed = measure_speed(tiny_model, tiny_model, ["a man", "the dog runs", "a cat"] * 5, rounds=3)
    assert speed["device"] == "cpu"
    assert speed["threads"] == torch.get_num_threads()
    latency, rate = speed["latency_ms"], speed["throughput_texts_per_s"]
    assert 0 < latency["model"]["median"] <= latency["model"]["p95"]
    assert latency["ratio"] == latency["model"]["median"] / latency["baseline"]["median"]
    assert rate["ratio"] == rate["model"] / rate["baseline"]
    for figures in (latency, rate):
        low, high = figures["ratio_iqr"]
        assert 0 < low <= high


def test_models_take_turns_after_a_warm_up(tiny_model, monkeypatch):
    calls = []

    class Spy:
        device = "cpu"

        def __init__(self, name):
            self.name = name

        def encode(self, texts, **kwargs):
            calls.append((self.name, texts if isinstance(texts, str) else len(texts)))

    texts = [f"text {index}" for index in range(10)]
    options = {"rounds": 2, "latency_texts": 2, "throughput_texts": 5}
    measure_speed(Spy("m"), Spy("b"), texts, **options)
    timed = calls[4:]
    assert timed[:4] == [("m", "text 0"), ("b", "text 0"), ("b", "text 5"), ("m", "text 5")]
    assert timed[4:] == [("m", 5), ("b", 5), ("b", 5), ("m", 5)]


def test_ratios_are_model_over_baseline():
    latency = model_analysis._summarise_latency([0.001, 0.002, 0.003], [0.002, 0.004, 0.006])
    assert latency["model"]["median"] == pytest.approx(2)
    assert (latency["ratio"], latency["ratio_iqr"]) == (0.5, [0.5, 0.5])
    rate = model_analysis._summarise_throughput([1.0, 1.0], [2.0, 2.0], 100)
    assert rate == {"model": 100.0, "baseline": 50.0, "ratio": 2.0, "ratio_iqr": [2.0, 2.0]}


def test_speed_arguments(tiny_model):
    with pytest.raises(ValueError, match="no sentences to measure speed on"):
        measure_speed(tiny_model, tiny_model, [])
    with pytest.raises(ValueError, match="rounds 0 measures nothing"):
        measure_speed(tiny_model, tiny_model, ["a"], rounds=0)

    class Elsewhere:
        device = "cuda:0"

    with pytest.raises(ValueError, match="model is on cpu and baseline on cuda:0"):
        measure_speed(tiny_model, Elsewhere(), ["a"])
