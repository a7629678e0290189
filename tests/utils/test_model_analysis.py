"""Speed of two models in turns."""

import pytest
import torch

from bge_pruning.utils import model_analysis
from bge_pruning.utils.model_analysis import measure_speed, take_turns


@pytest.fixture
def embedder(model_folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(model_folder), device="cpu")

    class Embedder:
        device, batch_size = "cpu", 4

        def encode(self, texts):
            return model.encode(texts, show_progress_bar=False)

    return Embedder()


def test_speed_has_every_figure(embedder):
    speed = measure_speed(embedder, embedder, ["a man", "the dog runs", "a cat"] * 5, rounds=3)
    assert speed["device"] == "cpu"
    assert speed["batch_size"] == 4
    assert speed["threads"] == torch.get_num_threads()
    latency, rate = speed["latency_ms"], speed["throughput_texts_per_s"]
    assert 0 < latency["model"]["median"] <= latency["model"]["p95"]
    assert latency["ratio"] == latency["model"]["median"] / latency["baseline"]["median"]
    assert rate["ratio"] == rate["model"] / rate["baseline"]
    for figures in (latency, rate):
        low, high = figures["ratio_iqr"]
        assert 0 < low <= high


def test_models_take_turns_after_a_warm_up():
    calls = []

    class Spy:
        device, batch_size = "cpu", 3

        def __init__(self, name):
            self.name = name

        def encode(self, texts):
            calls.append((self.name, texts[0] if len(texts) == 1 else len(texts)))

    texts = [f"text {index}" for index in range(10)]
    options = {"rounds": 2, "latency_texts": 2, "throughput_texts": 5}
    measure_speed(Spy("m"), Spy("b"), texts, **options)
    timed = calls[4:]
    assert timed[:4] == [("m", "text 0"), ("b", "text 0"), ("b", "text 5"), ("m", "text 5")]
    assert timed[4:] == [("m", 5), ("b", 5), ("b", 5), ("m", 5)]


def test_in_each_round_another_one_goes_first():
    calls = []
    jobs = {name: lambda i, n=name: calls.append((n, i)) or len(calls) for name in "abc"}
    found = take_turns(jobs, lambda done: done < 3)
    assert "".join(name for name, _ in calls) == "abcbcacab"
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert take_turns(jobs, lambda _: False) == {"a": [], "b": [], "c": []}


def test_ratios_are_model_over_baseline():
    latency = model_analysis._summarise_latency(
        {"model": [0.001, 0.002, 0.003], "baseline": [0.002, 0.004, 0.006]}
    )
    assert latency["model"]["median"] == pytest.approx(2)
    assert (latency["ratio"], latency["ratio_iqr"]) == (0.5, [0.5, 0.5])
    rate = model_analysis._summarise_throughput({"model": [1.0] * 2, "baseline": [2.0] * 2}, 100)
    assert rate == {"model": 100.0, "baseline": 50.0, "ratio": 2.0, "ratio_iqr": [2.0, 2.0]}


def test_speed_arguments(embedder):
    with pytest.raises(ValueError, match="no sentences to measure speed on"):
        measure_speed(embedder, embedder, [])
    with pytest.raises(ValueError, match="rounds 0 measures nothing"):
        measure_speed(embedder, embedder, ["a"], rounds=0)

    class Elsewhere:
        device, batch_size = "cuda:0", 4

    with pytest.raises(ValueError, match="device of the model is cpu and of the baseline cuda:0"):
        measure_speed(embedder, Elsewhere(), ["a"])

    class Larger:
        device, batch_size = "cpu", 8

    with pytest.raises(ValueError, match="batch_size of the model is 4 and of the baseline 8"):
        measure_speed(embedder, Larger(), ["a"])
