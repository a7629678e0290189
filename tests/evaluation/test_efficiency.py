"""Speed beside the ideal: what is counted, what is left out, what noise forbids to claim."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from bge_pruning.evaluation import efficiency
from bge_pruning.evaluation.efficiency import (
    COMPILE,
    ONNX,
    REAL,
    RUNTIMES,
    TORCH,
    Setting,
    estimate_activations,
    find_saturation,
    measure_efficiency,
    measure_setting,
)
from bge_pruning.evaluation.encoders import load_encoder
from bge_pruning.evaluation.random_model import random_base_model
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.utils.model_analysis import measure_peak_bytes

TEXTS = ["the man plays a flute", "a dog", "the cat eats bread and the dog plays"]
SHAPE = EncoderShape(64, 4, 2, 256, 300, head_dim=16, max_position_embeddings=80)


@pytest.fixture
def encoder(model_folder):
    return load_encoder(str(model_folder))


@pytest.fixture
def compiled(monkeypatch):
    """Dynamo without a compiler behind it, which would take a minute; the models it was put on."""
    found = []
    compile_encoder = XLMRobertaBackbone.compile_encoder

    def compile_quickly(backbone, training):
        found.append(backbone)
        compile_encoder(backbone, training, "eager")

    monkeypatch.setattr(XLMRobertaBackbone, "compile_encoder", compile_quickly)
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize("length", [6, REAL])
def test_a_setting(encoder, length):
    both = {"model": encoder, "baseline": encoder}
    found = measure_setting(both, Setting(2, length), TEXTS, seconds=0.2)
    assert found["rounds"] >= efficiency.LEAST_ROUNDS
    assert found["ideal"] == 1.0
    assert 0.2 < found["speedup"]["median"] < 5.0
    assert found["share"] == found["speedup"]["median"]
    tokens = 6 * 2 if length == 6 else sum(encoder.tokenize(TEXTS).lengths)
    texts = 2 if length == 6 else 3
    rate = found["model"]["tokens_per_s"] / found["model"]["texts_per_s"]
    assert rate == pytest.approx(tokens / texts)
    assert found["model"]["tokens_per_text"] == tokens / texts
    assert found["model"]["activation_bytes"] > 0
    a_call, batches = 1e3 * texts / found["model"]["texts_per_s"], 1 if length == 6 else 2
    assert batches * found["model"]["latency_ms"]["median"] == pytest.approx(a_call)
    # One that takes too long has two turns and supports no claim.
    found = measure_setting(both, Setting(2, length), TEXTS, seconds=1e-9)
    assert (found["rounds"], found["noisy"]) == (efficiency.FEWEST_ROUNDS, True)


def test_real_texts_are_spread_over_all(encoder, monkeypatch):
    encode = Mock(wraps=encoder.encode)
    monkeypatch.setattr(encoder, "encode", encode)
    texts = ["a dog"] * 50 + ["the cat"] * 50
    measure_setting({"model": encoder}, Setting(1, REAL), texts, 0.01)
    encode.assert_called_with(["a dog"] * 8 + ["the cat"] * 8)
    monkeypatch.setattr(encoder, "prompts", {"prompts": {"x": "a "}, "default_prompt_name": "x"})
    measure_setting({"model": encoder}, Setting(1, REAL), texts, 0.01)
    encode.assert_called_with(["a a dog"] * 8 + ["a the cat"] * 8)


def test_settings_and_what_is_left_out(encoder):
    opened = {TORCH: {"model": encoder}}
    found = measure_efficiency(opened, [1, 2], [4, 10_000], TEXTS, 0.01)
    places = [(s["runtime"], s["batch_size"], s["length"]) for s in found["settings"]]
    assert places == [(TORCH, 1, 4), (TORCH, 2, 4), (TORCH, 1, REAL), (TORCH, 2, REAL)]
    assert (found["max_length"], found["too_long"]) == (128, [10_000])
    assert found["too_large"] == []
    assert "speedup" not in found["settings"][0]
    assert found["weight_bytes"][TORCH]["model"] > 0


def test_what_does_not_fit_into_memory_is_left_out(encoder, monkeypatch):
    monkeypatch.setattr(efficiency, "free_bytes", lambda _: 100_000)
    found = measure_efficiency({TORCH: {"model": encoder}}, [1, 8], [4, 64], (), 0.01)
    assert [(s["batch_size"], s["length"]) for s in found["settings"]] == [(1, 4), (8, 4), (1, 64)]
    needed = 4 * 8 * 64 * 8 * 32  # bytes x texts x tokens x values
    place = {"runtime": TORCH, "batch_size": 8, "length": 64}
    assert found["too_large"] == [{**place, "needed_bytes": needed, "free_bytes": 100_000}]


def test_onnx_runtime_keeps_what_both_models_took(encoder, monkeypatch):
    monkeypatch.setattr(efficiency, "free_bytes", lambda _: 0)
    both = {"model": encoder, "baseline": encoder}
    opened = dict.fromkeys(RUNTIMES, both)  # what runs does not matter: nothing is measured
    found = measure_efficiency(opened, [1], [64], (), 0.01)["too_large"]
    shape = encoder.base.shape
    expected = {name: 4 * estimate_activations(shape, 1, 64, name) for name in RUNTIMES}
    expected[ONNX] *= 2
    assert {s["runtime"]: s["needed_bytes"] for s in found} == expected


NARROW = {"hidden_size": 32, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "changes", [{}, {"intermediate_size": 64}, {"num_attention_heads": 2}, NARROW]
)
def test_the_estimate_is_what_a_batch_takes_and_little_more(changes):
    shape = replace(SHAPE, **changes)
    encoder = TextEncoder(random_base_model(shape, "random"))
    ids = torch.full((4, 64), 7)

    @torch.inference_mode()
    def embed():
        return encoder.compute(ids, torch.ones_like(ids), ("dense_vecs",))

    estimate = 4 * estimate_activations(shape, 4, 64, TORCH)
    assert 0.99 < estimate / measure_peak_bytes(embed) < 1.2
    more = 4 * estimate_activations(shape, 4, 64, ONNX) - estimate
    assert more == 2 * 4 * 4 * shape.num_attention_heads * 64 * 64


def test_the_most_tokens_per_second():
    def setting(runtime, size, model, baseline):
        rates = {"model": model, "baseline": baseline}
        parts = {n: {"texts_per_s": r / 8, "tokens_per_s": r} for n, r in rates.items()}
        return {"runtime": runtime, "batch_size": size, "length": 8, **parts}

    rows = ((TORCH, 1, 80, 40), (TORCH, 8, 160, 32), (ONNX, 1, 16, 8))
    found = find_saturation([setting(*row) for row in rows])
    place = {"batch_size": 8, "length": 8}
    assert found[TORCH]["model"] == {**place, "texts_per_s": 20, "tokens_per_s": 160}
    assert found[TORCH]["baseline"]["batch_size"] == 1
    assert found[ONNX]["model"]["tokens_per_s"] == 16


def test_compiled_before_the_clock_runs(encoder, compiled, model_folder, monkeypatch):
    forms = []

    def read_clock():
        forms[-1].append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return time.perf_counter()

    def take_turns(*arguments):
        forms.append([])
        return take_turns_as_ever(*arguments)

    take_turns_as_ever = efficiency._take_turns
    monkeypatch.setattr(efficiency, "_take_turns", take_turns)
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(perf_counter=read_clock))
    both = {"model": encoder, "baseline": load_encoder(str(model_folder))}
    opened = {TORCH: both, COMPILE: both}
    found = measure_efficiency(opened, [2], [6], TEXTS, 0.01)["settings"]
    places = [(runtime, length) for runtime in opened for length in (6, REAL)]
    assert [(s["runtime"], s["length"]) for s in found] == places
    assert compiled == [e.backbone for e in both.values()] * 2
    # Nothing is compiled in the timed part, and something for each setting before it.
    assert [len(set(counts)) for counts in forms] == [1] * 4
    assert forms[0][0] == forms[1][0] < forms[2][0] < forms[3][0]
    assert found[0]["model"]["activation_bytes"] > 0
    assert found[2]["model"]["activation_bytes"] is None
