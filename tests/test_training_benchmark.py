"""What the benchmark of training measures, on the tiny model."""

from __future__ import annotations

import numpy as np
import pytest

from bge_pruning.benchmark_trainings import FIXED, GATES, GROUPED, PLAIN, RANDOM, TEACHER
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.models.pretrained import load_base_model
from bge_pruning.training_benchmark import StepCost, measure_training, summarise
from bge_pruning.utils.training_cost import render_training


@pytest.fixture
def base(model_folder):
    return load_base_model(str(model_folder))


@pytest.fixture(scope="module")
def texts() -> TokenizedTexts:
    """Forty texts of 3 to 20 tokens; no token is padding."""
    generator = np.random.default_rng(2)
    lengths = generator.integers(3, 21, 40)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return TokenizedTexts(generator.integers(4, 60, starts[-1]).astype(np.int32), starts, 0)


def test_all_is_measured_and_rendered(base, texts):
    costs = measure_training(base, texts, 8, 12, 3)
    assert [(c.training, c.batches) for c in costs] == [
        (name, kind) for kind in (FIXED, RANDOM, GROUPED) for name in (PLAIN, GATES, TEACHER)
    ]
    for cost in costs:
        assert len(cost.seconds) == len(cost.tokens) == 3
        assert min(cost.seconds) > 0 and cost.peak_bytes > 0 and cost.utilisation > 0
        assert cost.tokens_per_second == sum(cost.tokens) / sum(cost.seconds)
    assert costs[0].padding == 0.0 < costs[3].padding
    text = render_training(summarise(costs))
    assert text.count("| gates and teacher |") == 3
    assert "times plain on random batches." in text.splitlines()[-1]


def test_ratios_are_medians_on_the_same_batch():
    def cost(training: str, kind: str, seconds: list[float]) -> StepCost:
        return StepCost(training, kind, seconds, [100, 100, 100], 0.0, 0.5, 1)

    seconds = {PLAIN: [1.0, 2.0, 4.0], GATES: [1.1, 2.4, 4.2], TEACHER: [2.2, 3.6, 4.2]}
    costs = [cost(n, k, s) for k in (FIXED, RANDOM, GROUPED) for n, s in seconds.items()]
    found = summarise(costs)
    assert found["ratios"][FIXED]["gates"][1] == pytest.approx(1.1)
    assert found["ratios"][FIXED]["teacher"][1] == pytest.approx(1.5)
    assert found["throughput"][GROUPED] == pytest.approx(7.0 / 7.7)


def test_too_few_texts(base, texts):
    with pytest.raises(ValueError, match=r"40 texts are too few for 6 batches of 8\. To fix"):
        measure_training(base, texts, 8, 12, 6)
