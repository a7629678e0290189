"""Where the metrics of a training go."""

import io
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bge_pruning.callbacks.pruning_callback import GateMapCallback
from bge_pruning.training.builders import build_callbacks, build_loggers
from tests.common.trainings import logged


def test_a_metrics_file_is_always_there(configure, tmp_path):
    (logger,) = build_loggers(configure())
    assert logger.path == tmp_path / "runs" / "tiny" / "metrics.jsonl"
    assert not (tmp_path / "logs").exists()


def test_tensorboard_has_every_metric(tmp_path, train_tiny):
    run = train_tiny(tmp_path, "max_duration=3ba", "loggers.tensorboard=true")
    folder = tmp_path / "logs" / "tiny" / "tiny"
    events = EventAccumulator(str(folder)).Reload()
    for key in ("loss/train/total", "pruning/lambda_1/hidden", "metrics/dev/cosine_spearman"):
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == pytest.approx(logged(run, key), rel=1e-6)


class Stream(io.StringIO):
    """A stream whose methods can be replaced, as those of the real one."""


def test_log_file_has_metrics(tmp_path, train_tiny, monkeypatch):
    for name in ("stdout", "stderr"):  # the logger replaces their methods for good
        monkeypatch.setattr(sys, name, Stream())
    run = train_tiny(tmp_path, "max_duration=2ba", "loggers.file=true")
    text = (tmp_path / "logs" / "tiny" / "prune-rank0.txt").read_text()
    losses = logged(run, "loss/train/total")
    assert len(losses) == 2
    for batch, value in losses.items():
        assert f"[metric][batch={batch}]: loss/train/total: {value:.4f} " in text


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("wandb_keys", ["null", "{}"])
def test_gates_are_drawn_while_training_only_where_wandb_shows_them(
    wandb_keys, gates, configure, base, build_all
):
    none = [] if gates else ["model.l0_module=null"]
    config = configure(f"loggers.wandb={wandb_keys}", *none)
    metadata, model = build_all(config, base)
    callbacks = build_callbacks(config, model, metadata, base, {})
    drawn = [type(callback) for callback in callbacks].count(GateMapCallback)
    assert drawn == (gates and wandb_keys == "{}")
