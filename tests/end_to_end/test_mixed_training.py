"""Several sources in one run: what is trained, and resuming it.

Runs that are killed: reliability/test_kills.py.
"""

import pytest

from bge_pruning.callbacks.data_callback import DataCallback
from bge_pruning.datasets.mixed_dataloader import MixedDataset
from tests.common.trainings import extract_json, logged


@pytest.fixture
def mixture(sts_csv, contrastive_jsonl, tmp_path) -> tuple[str, ...]:
    """Three sources with all their losses."""
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [line.split(",")[0] for line in sts_csv.read_text().splitlines()]
    for name, part in (("a", lines[:25]), ("b", lines[25:])):
        (texts / f"{name}.txt").write_text("\n".join(part) + "\n")
    return (
        f"data.train=[{{name: pairs, kind: sts, path: {sts_csv}, weight: 0.5}},"
        f" {{name: asked, kind: contrastive, path: {contrastive_jsonl}, weight: 0.3,"
        f" negatives: 1}},"
        f" {{name: texts, kind: sentences, path: '{texts}/*.txt', weight: 0.2}}]",
        "loss={sts_regression: 0.0, cosent: 0.1, distillation_alignment: 1.0,"
        " distillation_similarity: 1.0, distillation_sparse: 0.1, distillation_colbert: 1.0,"
        " contrastive: 0.2, self_distillation: 0.1, temperature: 0.1, learn_temperature: true}",
        "model.l0_module.lagrangian_warmup_steps=2ba",
        "model.dropout=0.1",
        "scheduler.name=constant",
    )


@pytest.fixture
def batches(monkeypatch) -> list:
    """What every batch was made of, as it comes to the trainer."""
    seen = []
    start = DataCallback.batch_start

    def record(self, state, logger):
        batch = state.batch
        seen.append((state.timestamp.batch.value, batch["source"], batch["input_ids"].tolist()))
        start(self, state, logger)

    monkeypatch.setattr(DataCallback, "batch_start", record)
    return seen


def test_each_source_has_its_losses(tmp_path, train_tiny, mixture, batches):
    intervals = ("save_interval=1ep", "eval_interval=1ep")
    run = train_tiny(tmp_path, *mixture, "max_duration=1ep", *intervals)
    assert len(batches) == 40 // 8 + 40 // 8 + 40 // 8  # an epoch is as long as all sources
    sources = [source for _, source, _ in batches]
    counts = {name: sources[:10].count(name) for name in ("pairs", "asked", "texts")}
    assert counts == {"pairs": 5, "asked": 3, "texts": 2}
    # The logger counts a step when it is over.
    steps = {name: {i + 1 for i, s in enumerate(sources) if s == name} for name in counts}
    shift = min(logged(run, "loss/train/total")) - 1
    for part, expected in {
        "cosent": steps["pairs"],
        "contrastive": steps["asked"],
        "self_distillation": steps["asked"],
        "distillation_colbert": set().union(*steps.values()),
    }.items():
        assert {step - shift for step in logged(run, f"loss/train/{part}")} == expected
    assert extract_json(run, tmp_path / "small")["largest_difference"] <= 1e-5


@pytest.mark.parametrize("stop", [3, 17])
def test_going_on_gives_the_next_batches_and_the_same_model(
    stop, tmp_path, train_tiny, mixture, batches, load_state, assert_same, monkeypatch
):
    """Inside the first epoch of 15 batches and the second; dropout and all draws included."""
    # The first part is told another length, which binarization follows, and which texts the teacher
    # embeds together.
    overrides = (*mixture, "save_interval=1ba", "checkpoints_to_keep=1", "eval_interval=50ba")
    overrides += ("model.l0_module.binarization=0", "teacher.cache=false")
    whole = train_tiny(tmp_path / "whole", *overrides, "max_duration=20ba")
    everything, batches[:] = list(batches), []
    train_tiny(tmp_path / "parts", *overrides, f"max_duration={stop}ba")
    assert batches == everything[:stop]
    batches.clear()
    made = []
    item = MixedDataset.__getitem__
    monkeypatch.setattr(
        MixedDataset, "__getitem__", lambda self, index: made.append(index) or item(self, index)
    )
    parts = train_tiny(tmp_path / "parts", *overrides, "max_duration=20ba", "autoresume=true")
    assert batches == everything[stop:]
    assert len(made) == 8 * (20 - stop)  # no batch was made again to get there
    for part in ("model", "optimizers"):
        assert_same(load_state(whole)[part], load_state(parts)[part], 0.0, part)
    assert logged(whole, "loss/train/total") == logged(parts, "loss/train/total")


def test_other_sources_than_the_run_had_are_refused(tmp_path, train_tiny, mixture, sts_csv):
    train_tiny(tmp_path, *mixture, "max_duration=3ba", "save_interval=1ba")
    other = f"data.train=[{{name: other, kind: sts, path: {sts_csv}}}]"
    fewer = ("contrastive=0", "self_distillation=0", "learn_temperature=false")
    overrides = (other, *(f"loss.{part}" for part in fewer), "max_duration=6ba")
    with pytest.raises(ValueError, match=r"trained on pairs, asked, texts, the config.*To fix"):
        train_tiny(tmp_path, *mixture, *overrides, "autoresume=true")
