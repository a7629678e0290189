"""Speed of two models in turns, and bytes of tensors that are alive together."""

from time import sleep
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bge_pruning.utils import model_analysis
from bge_pruning.utils.model_analysis import (
    free_bytes,
    measure_peak_bytes,
    measure_speed,
    take_turns,
)


def test_speed_has_every_figure():
    embedder = SimpleNamespace(device="cpu", batch_size=4, encode=lambda texts: sleep(1e-4))
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


def test_models_take_turns_after_a_warm_up_and_in_each_round_another_goes_first():
    calls = []

    class Spy:
        device, batch_size = "cpu", 3

        def __init__(self, name):
            self.name = name

        def encode(self, texts):
            calls.append((self.name, texts[0] if len(texts) == 1 else len(texts)))

    texts = [f"text {index}" for index in range(10)]
    measure_speed(Spy("m"), Spy("b"), texts, rounds=2, latency_texts=2, throughput_texts=5)
    timed = calls[4:]
    assert timed[:4] == [("m", "text 0"), ("b", "text 0"), ("b", "text 5"), ("m", "text 5")]
    assert timed[4:] == [("m", 5), ("b", 5), ("b", 5), ("m", 5)]
    calls = []
    jobs = {name: lambda i, n=name: calls.append((n, i)) or len(calls) for name in "abc"}
    found = take_turns(jobs, lambda done: done < 3)
    assert "".join(name for name, _ in calls) == "abcbcacab"
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert take_turns(jobs, lambda _: False) == {"a": [], "b": [], "c": []}


@pytest.mark.parametrize(
    ("sentences", "changes", "message"),
    [
        ([], {}, "no sentences to measure speed on"),
        (["a"], {"rounds": 0}, "rounds 0 measures nothing"),
        (["a"], {"device": "cuda:0"}, "device of the model is cpu and of the baseline cuda:0"),
        (["a"], {"batch_size": 8}, "batch_size of the model is 4 and of the baseline 8"),
    ],
)
def test_speed_arguments(sentences, changes, message):
    model = SimpleNamespace(device="cpu", batch_size=4)
    other = SimpleNamespace(**{**vars(model), **changes})
    with pytest.raises(ValueError, match=message):
        measure_speed(model, other, sentences, rounds=changes.get("rounds", 7))


def test_what_is_freed_and_changed_in_place_takes_nothing_and_kept_activations_count():
    def action():
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + 1
        del first
        third = second * 2
        del second, third
        return torch.zeros(10)

    assert measure_peak_bytes(action) == 8000
    values = torch.zeros(100)
    assert measure_peak_bytes(lambda: values.add_(1).mul_(2)) == 0
    layer = nn.Linear(100, 100)
    inputs = torch.zeros(5, 100)

    def action():
        with torch.inference_mode():
            return layer(inputs).view(-1)[:10].reshape(2, 5)

    assert measure_peak_bytes(action) == 5 * 100 * 4
    layers = nn.Sequential(*(nn.Linear(50, 50) for _ in range(4)))
    inputs = torch.zeros(8, 50)

    def forward():
        with torch.inference_mode():
            layers(inputs)

    def train():
        layers(inputs).sum().backward()

    assert measure_peak_bytes(forward) <= 2 * 8 * 50 * 4
    assert measure_peak_bytes(train) >= 4 * 50 * 50 * 4  # the gradients of the weights


def test_free_memory_is_what_the_system_can_give(tmp_path, monkeypatch):
    assert free_bytes() > 1_000_000
    monkeypatch.setattr(model_analysis, "MEMORY", tmp_path / "meminfo")
    model_analysis.MEMORY.write_text("MemFree:  1 kB\nMemAvailable:  2048 kB\nHugePages: 0\n")
    assert free_bytes() == 2 * 2**20


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_counts():
    weights = torch.ones(1 << 20, device="cuda")  # 4 MiB, not counted

    def action():
        first = weights * 2
        second = first + 1
        del first
        return second * 2

    assert measure_peak_bytes(action, "cuda") == 2 * 4 * 2**20
    before = free_bytes("cuda")
    kept = torch.ones(1 << 28, device="cuda")  # 1 GiB
    assert before - free_bytes("cuda") >= kept.nbytes
    del kept
    assert before - free_bytes("cuda") < 2**26  # kept by torch, and free for tensors
