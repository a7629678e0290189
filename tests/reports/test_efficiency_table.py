"""Speed and the costs of training steps as text, and claims that the spread supports."""

from __future__ import annotations

import pytest

from bge_pruning.reports.efficiency_table import render_efficiency, render_training

PART = {"latency_ms": {"median": 2.0, "p95": 3.0}, "texts_per_s": 16.0, "tokens_per_s": 2048.0}
PART |= {"tokens_per_text": 128.0, "gflops_per_token": 0.1, "activation_bytes": 2_000_000}
COUNTS = {"encoder": 1_000_000, "total": 3_000_000}
BEST = {"batch_size": 32, "length": 128, "texts_per_s": 16.0, "tokens_per_s": 2048.0}


def setting(share: float = 0.93, **changed) -> dict:
    found = {"runtime": "torch", "batch_size": 32, "length": 128, "rounds": 5, "noisy": False}
    found["speedup"] = {"median": 2.0 * share, "quartiles": [1.5, 2.5]}
    return {**found, "model": PART, "baseline": PART, "ideal": 2.0, "share": share, **changed}


def result(*settings: dict, **changed) -> dict:
    names = ("model", "baseline")
    weights = {"model": 1e6, "baseline": 2e6}
    found = {"model": "small", "baseline": "large", "device": "cpu", "dtype": "fp32", "threads": 2}
    found |= {"machine": {"cpu": "Some CPU", "cores": 4, "gpu": None}, "settings": list(settings)}
    found |= {"shapes": dict.fromkeys(names, "2 layers"), "too_long": [], "too_large": []}
    found |= {"saturation": {"torch": dict.fromkeys(names, BEST)}, "max_length": 512}
    found["parameters"] = dict.fromkeys(names, COUNTS)
    found["weight_bytes"] = {"torch": weights, "compile": weights, "onnx": {"model": 3e6}}
    return {**found, **changed}


def test_tables_of_two_models_and_of_one():
    lines = render_efficiency(result(setting())).splitlines()
    parameters = "2 layers, 1.0M parameters in the encoder, 3.0M in all"
    assert lines[:3] == [
        f"model:    small, {parameters}",
        f"baseline: large, {parameters}",
        "machine:  Some CPU, 2 of 4 cores, cpu, fp32",
    ]
    assert lines[4].startswith("| runtime | texts | tokens | ms (p95) |")
    cells = "32 | 128 | 2.0 (3.0) | 16.0 | 2,048 | 0.1000 | 2.0 MB | 2.0 (3.0)"
    assert lines[6] == f"| torch | {cells} | 1.86 (1.50 to 2.50) | 2.00 | 93% |"
    best = "2,048 tokens/s, 16.0 texts/s (32 x 128)"
    assert lines[8:] == [
        "weights (torch, compile): model 1.0 MB, baseline 2.0 MB",
        "weights (onnx): model 3.0 MB",
        f"highest throughput (torch): model {best}; baseline {best}",
        "torch, 32 texts of 128 tokens: 93% of the ideal speed-up, at least 90%",
    ]
    alone = {key: value for key, value in setting().items() if key != "baseline"}
    part = {**PART, "activation_bytes": None}
    changed = {"baseline": None, "shapes": {"model": "2 layers"}}
    changed["machine"] = {"cpu": "Some CPU", "cores": 4, "gpu": "Some GPU"}
    text = render_efficiency(result({**alone, "length": "real", "model": part}, **changed))
    assert "machine:  Some GPU, cpu, fp32" in text
    assert "| torch | 32 | real (128.0) | 2.0 (3.0) | 16.0 | 2,048 | 0.1000 | - |" in text
    assert "speed-up" not in text and "baseline:" not in text


def test_what_is_claimed_and_what_is_left_out():
    below = "torch, 32 texts of 128 tokens: 85% of the ideal speed-up, below 90%"
    noisy = "1 of 1 long settings are too noisy for a claim"
    for found, cell, line in (
        (setting(0.85), "85%", below),
        (setting(noisy=True), "noise, 5 turns", noisy),
        (setting(noisy=True, rounds=2), "noise, 2 turns", noisy),
    ):
        text = render_efficiency(result(found))
        assert line in text and f"| {cell} |" in text
    large = {"runtime": "onnx", "batch_size": 32, "length": 512}
    large |= {"needed_bytes": 3 * 2**30, "free_bytes": 2**31}
    lines = render_efficiency(result(too_large=[large], too_long=[1024, 8192])).splitlines()
    assert "left out, needs about 3.0 GiB and 2.0 GiB are free: onnx, 32 x 512" in lines
    assert "left out, beyond the limit of 512 tokens a text: 1024, 8192" in lines
    lines = render_efficiency(result(saturation={}, too_long=[1024])).splitlines()
    assert lines[4] == "nothing was measured"
    assert lines[-1] == "left out, beyond the limit of 512 tokens a text: 1024"


def cost(training, batches):
    found = {"median_seconds": 0.25, "data_share": 0.0123, "tokens_per_second": 4321.0}
    found |= {"padding": 0.5, "utilisation": 0.617, "peak_bytes": 12_000_000}
    return {"batches": batches, "training": training, **found}


@pytest.fixture
def trained():
    on = {"device": "cpu", "machine": {"cpu": "Some CPU", "cores": 2, "gpu": None}, "threads": 1}
    on |= {"model": "folder", "random_weights": False, "shape": "4 layers", "dtype": "fp32"}
    return {
        **on,
        "batch_size": 8,
        "steps": 12,
        "peak_flops": 1.23e12,
        "costs": [cost("plain", "length groups"), cost("cached", "length groups")],
        "ratios": {"length groups": {"gates": [0.9, 1.0, 1.2], "cached": [1.0, 1.0124, 1.02]}},
        "reading": {"length groups": [0.0001, 0.00052, 0.001]},
        "throughput": {"random batches": 1.1, "length groups": 2.345},
    }


def test_costs_of_training_with_their_ratios_and_goals(trained):
    lines = render_training(trained).splitlines()
    assert lines[0] == (
        "folder (4 layers) on Some CPU (cpu, fp32, 1 thread): 12 steps of 8 texts each; a large "
        "product reaches 1,230 GFLOP/s."
    )
    row = "| length groups | plain fine-tuning | 0.250 | 1.23% | 4,321 | 50.0% | 61.7% | 12 MB |"
    assert row in lines
    header = "gates / plain (limit 1.10) | cached / gates (limit 1.03) | reading the cache / gates"
    ratios = "1.000 (0.900 to 1.200) | 1.012 (1.000 to 1.020) | 0.00052 (0.00010 to 0.00100)"
    assert f"| batches | {header} |" in lines and f"| length groups | {ratios} |" in lines
    assert lines[-2].endswith("gates on random batches: 1.10 times plain on random batches.")
    assert lines[-1].endswith(
        "gates on length groups: 2.35 times plain on random batches (goal: 1.5 or more)."
    )
    trained |= {"costs": trained["costs"][:1], "ratios": {"length groups": {}}}
    trained |= {"reading": {}, "throughput": {}}
    text = render_training({**trained, "threads": 2, "random_weights": True})
    assert text.startswith("folder (random weights, 4 layers) on Some CPU")
    assert "2 threads" in text and "limit" not in text and "goal" not in text
    assert text.endswith("in the widest batch.")
