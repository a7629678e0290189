"""What went into training: rows, padding, and each source's share and loss."""

import math
import re

import pytest

from bge_pruning.callbacks.data_callback import DataCallback
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from tests.common.trainings import read_metrics


def metrics(run) -> list[tuple[int, dict]]:
    return [(row["batch"], row["metrics"]) for row in read_metrics(run)]


def logged(run) -> dict[int, dict]:
    return {batch: found for batch, found in metrics(run) if "data/padding_share" in found}


def losses(run) -> list[float]:
    of_gates = ("loss/train/lagrangian", "loss/train/binarization")
    found = [row for _, row in metrics(run) if "loss/train/total" in row]
    return [row["loss/train/total"] - sum(row[key] for key in of_gates) for row in found]


def test_a_run_logs_what_the_table_says(tmp_path, train_tiny, sts_csv, contrastive_jsonl):
    pairs = f"{{name: pairs, kind: sts, path: {sts_csv}, weight: 3}}"
    asked = f"{{name: asked, kind: contrastive, path: {contrastive_jsonl}, weight: 1}}"
    loss = ("loss.contrastive=0.1", "loss.contrastive_outputs=[dense]")
    times = ("max_duration=8ba", "log_interval=4ba")
    run = train_tiny(tmp_path, f"data.train=[{pairs}, {asked}]", *loss, *times)
    rows, steps = logged(run), losses(run)
    assert list(rows) == [4, 8]
    table = re.findall(r"``(data/\S+)``", DataCallback.__doc__)
    names = {key.replace("<source>", name) for key in table for name in ("pairs", "asked")}
    for batch, row in rows.items():
        assert {key for key in row if key.startswith("data/")} == names
        assert (row["data/share/pairs"], row["data/share/asked"]) == (0.75, 0.25)
        assert 0 < row["data/padding_share"] < 0.9
        # In both sources a row is two texts.
        assert row["data/texts_per_second"] == pytest.approx(2 * row["data/rows_per_second"])
        assert row["data/rows_per_second"] > 0
        mean = 0.75 * row["data/loss/pairs"] + 0.25 * row["data/loss/asked"]
        assert mean == pytest.approx(sum(steps[batch - 4 : batch]) / 4, abs=1e-6)


def test_padding_is_that_of_the_batches(tmp_path, train_tiny, monkeypatch):
    masks = []
    start = DataCallback.batch_start

    def record(self, state, logger):
        masks.append(state.batch["attention_mask"])
        start(self, state, logger)

    monkeypatch.setattr(DataCallback, "batch_start", record)
    micro = ("device_train_microbatch_size=3", "loss.distillation_similarity=0")
    run = train_tiny(tmp_path, *micro, "log_interval=4ba")
    (row,) = logged(run).values()
    real, whole = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
    assert row["data/padding_share"] == pytest.approx(1 - real / whole)
    assert sum(len(m) for m in masks) == 4 * 8


def test_length_groups_pad_less(tmp_path, train_tiny):
    shares = {}
    for grouped in ("true", "false"):
        times = ("max_duration=5ba", "log_interval=5ba")
        run = train_tiny(tmp_path / grouped, f"data.group_by_length={grouped}", *times)
        shares[grouped] = logged(run)[5]["data/padding_share"]
    assert shares["true"] < shares["false"]


def test_the_loss_of_a_step_that_was_left_out_is_left_out(tmp_path, train_tiny, monkeypatch):
    loss = ComposerBGEM3.loss

    def broken(self, outputs, batch):
        parts = loss(self, outputs, batch)
        if self.l0_module.step == 1:
            parts["total"] = parts["total"] * math.nan
        return parts

    monkeypatch.setattr(ComposerBGEM3, "loss", broken)
    run = train_tiny(tmp_path, "optimizer.non_finite=skip", "log_interval=4ba")
    whole = [value for value in losses(run) if math.isfinite(value)]
    assert len(whole) == 3
    assert logged(run)[4]["data/loss/train"] == pytest.approx(sum(whole) / 3, abs=1e-6)
