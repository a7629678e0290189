"""The costs of training steps as text."""

from __future__ import annotations

import pytest

from bge_pruning.reports.efficiency_table import render_training


def cost(training, batches):
    return {
        "batches": batches,
        "training": training,
        "median_seconds": 0.25,
        "data_share": 0.0123,
        "tokens_per_second": 4321.0,
        "padding": 0.5,
        "utilisation": 0.617,
        "peak_bytes": 12_000_000,
    }


@pytest.fixture
def result():
    return {
        "model": "folder",
        "random_weights": False,
        "shape": "4 layers",
        "device": "cpu",
        "machine": {"cpu": "Some CPU", "cores": 2, "gpu": None},
        "threads": 1,
        "dtype": "fp32",
        "batch_size": 8,
        "steps": 12,
        "peak_flops": 1.23e12,
        "costs": [cost("plain", "length groups"), cost("cached", "length groups")],
        "ratios": {"length groups": {"gates": [0.9, 1.0, 1.2], "cached": [1.0, 1.0124, 1.02]}},
        "reading": {"length groups": [0.0001, 0.00052, 0.001]},
        "throughput": {"random batches": 1.1, "length groups": 2.345},
    }


def test_table_ratios_and_goals(result):
    lines = render_training(result).splitlines()
    assert lines[0] == (
        "folder (4 layers) on Some CPU (cpu, fp32, 1 thread): 12 steps of 8 texts each; a large "
        "product reaches 1,230 GFLOP/s."
    )
    row = "| length groups | plain fine-tuning | 0.250 | 1.23% | 4,321 | 50.0% | 61.7% | 12 MB |"
    assert row in lines
    assert (
        "| batches | gates / plain (limit 1.10) | cached / gates (limit 1.03) | reading the cache "
        "/ gates |"
    ) in lines
    assert (
        "| length groups | 1.000 (0.900 to 1.200) | 1.012 (1.000 to 1.020) | 0.00052 (0.00010 to "
        "0.00100) |"
    ) in lines
    assert lines[-2].endswith("gates on random batches: 1.10 times plain on random batches.")
    assert lines[-1].endswith(
        "gates on length groups: 2.35 times plain on random batches (goal: 1.5 or more)."
    )


def test_one_training_has_no_ratios(result):
    result |= {"costs": result["costs"][:1], "ratios": {"length groups": {}}}
    result |= {"reading": {}, "throughput": {}}
    text = render_training({**result, "threads": 2, "random_weights": True})
    assert text.startswith("folder (random weights, 4 layers) on Some CPU")
    assert "2 threads" in text and "limit" not in text and "goal" not in text
    assert text.endswith("in the widest batch.")
