"""Weights that follow what pruning has done to each source."""

import re

import numpy as np
import pytest

from bge_pruning.algorithms.source_weights import SourceWeights
from bge_pruning.datasets.mixed_dataloader import adapt_weights
from tests.common.trainings import logged

OVERRIDES = (
    "data.adapt_weights_interval=2ba",
    "data.adapt_batches=2",
    "max_duration=6ba",
    "save_interval=3ba",
    "loss.distillation_similarity=0",
    # What is drawn after a change is embedded after it.
    "teacher.cache=true",
)


@pytest.fixture
def two_sources(sts_csv) -> str:
    return (
        f"data.train=[{{name: pairs, kind: sts, path: {sts_csv}}},"
        f" {{name: texts, kind: sentences, path: {sts_csv}}}]"
    )


def metrics(run, key: str) -> list[float]:
    return [*logged(run, key).values()]


def test_weights_follow_the_losses(tmp_path, train_tiny, two_sources, monkeypatch):
    measured = []
    measure = SourceWeights._measure

    def record(self, model, state, pruned):
        losses = measure(self, model, state, pruned)
        measured.append((pruned, losses, self.dataset.schedule.weights()))
        return losses

    monkeypatch.setattr(SourceWeights, "_measure", record)
    run = train_tiny(tmp_path, *OVERRIDES, two_sources)
    assert [pruned for pruned, *_ in measured] == [False, True, True, True]
    # The unpruned model is its own teacher: its texts cost nothing.
    reference = measured[0][1]
    assert reference[1] == pytest.approx(0.0, abs=1e-6)
    assert reference[0] > 0.01
    for index, (_, losses, before) in enumerate(measured[1:]):
        expected = adapt_weights(before, losses, reference)
        for source, name in enumerate(("pairs", "texts")):
            assert metrics(run, f"data/weight/{name}")[index] == pytest.approx(expected[source])
            excess = losses[source] - reference[source]
            assert metrics(run, f"data/excess/{name}")[index] == pytest.approx(excess)


def test_what_is_logged_is_what_the_table_says(tmp_path, train_tiny, two_sources):
    interval = "data.adapt_weights_interval=0.34dur"  # 2 of 6 batches
    run = train_tiny(tmp_path, *OVERRIDES, two_sources, interval)
    for key in re.findall(r"``(data/\S+)``", SourceWeights.__doc__):
        for name in ("pairs", "texts"):
            assert len(metrics(run, key.replace("<source>", name))) == 3


def test_moving_weights_resume_exactly(tmp_path, train_tiny, two_sources, assert_same, load_state):
    l0 = "model.l0_module."  # nothing of it follows the length that a part is told
    fixed = ("scheduler.name=constant", f"{l0}lagrangian_warmup_steps=2ba", f"{l0}binarization=0")
    overrides = (*OVERRIDES, *fixed, two_sources)
    whole = train_tiny(tmp_path / "whole", *overrides)
    train_tiny(tmp_path / "parts", *overrides, "max_duration=3ba")
    parts = train_tiny(tmp_path / "parts", *overrides, "autoresume=true")
    assert_same(load_state(whole)["model"], load_state(parts)["model"])
    for name in ("pairs", "texts"):
        key = f"data/weight/{name}"
        assert metrics(whole, key) == metrics(parts, key)
        assert np.isfinite(metrics(whole, key)).all()
