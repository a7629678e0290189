"""The checkpoint of the best evaluation: when it is written, what it holds, what survives."""

import logging
import math
from pathlib import Path

import pytest
import torch
from composer.callbacks import CheckpointSaver

from bge_pruning.callbacks import best_checkpoint, evaluation_callback
from bge_pruning.model_io import checkpoint
from tests.common.trainings import logged

METRIC = "dev/cosine_spearman"
KEEP = f"evaluation.keep_best={METRIC}"
ALL = ("save_interval=1ba", "checkpoints_to_keep=9")


@pytest.fixture
def scores(monkeypatch) -> dict[int, float]:
    """What the next evaluations find, by step; fill it in."""
    found: dict[int, float] = {}
    monkeypatch.setattr(
        evaluation_callback,
        "_similarity",
        lambda state: {METRIC: found[state.timestamp.batch.value]},
    )
    return found


@pytest.fixture
def lines(caplog):
    name = best_checkpoint.__name__
    caplog.set_level(logging.INFO, logger=name)
    return lambda: [r.getMessage() for r in caplog.records if r.name == name]


def best_of(run: Path) -> checkpoint.BestScore:
    return checkpoint.read_best_score(run / "best-rank0.pt")


def test_best_is_kept_and_newest_found(
    tmp_path, train_tiny, scores, lines, load_state, assert_same
):
    scores |= {2: 0.3, 4: 0.5, 6: 0.5, 8: math.nan}
    run = train_tiny(tmp_path, KEEP, *ALL, "max_duration=8ba")
    assert best_of(run) == checkpoint.BestScore(METRIC, 0.5, 4)
    best, newest = checkpoint.find_checkpoint(run, best=True), checkpoint.find_checkpoint(run)
    assert best == run / "best-rank0.pt"
    assert newest.resolve().name == "ba8-rank0.pt"
    assert checkpoint.load_trained_model(best).batch == 4
    assert_same(load_state(best)["model"], load_state(run / "ba4-rank0.pt")["model"])
    assert lines() == [
        "best so far: dev/cosine_spearman 0.3000 at step 2",
        *["best so far: dev/cosine_spearman 0.5000 at step 4"] * 3,
    ]
    assert not list(run.glob(".*"))
    same_step = load_state(run / "ba4-rank0.pt")
    assert same_step.keys() - load_state(best).keys() == {"optimizers"}
    assert best.stat().st_size < 0.6 * (run / "ba4-rank0.pt").stat().st_size
    # The checkpoint of the step has the score of the step.
    expected = {"best": {"metric": METRIC, "score": 0.5, "batch": 4}}
    assert dict(same_step["callbacks"])["EvaluationCallback"] == expected


def test_a_real_score_decides(tmp_path, train_tiny, collection):
    data = f"data.eval=[{{name: docs, kind: beir, path: {collection}, split: test}}]"
    keep = "evaluation.keep_best=docs/mrr_at_10"
    run = train_tiny(tmp_path, data, keep, "eval_interval=1ba", "max_duration=6ba")
    found = logged(run, "eval/docs/mrr_at_10")
    best = max(found, key=found.get)
    assert len(set(found.values())) > 1
    assert best_of(run) == checkpoint.BestScore("docs/mrr_at_10", found[best], best)


def test_only_scores_that_are_no_number(tmp_path, train_tiny, scores, lines):
    scores |= {2: math.nan, 4: math.nan}
    run = train_tiny(tmp_path, KEEP)
    assert not (run / "best-rank0.pt").exists()
    assert lines() == []


def test_the_best_score_survives_in_the_checkpoint(tmp_path, train_tiny, scores):
    scores |= {2: 0.5, 4: 0.3, 6: 0.4, 8: 0.6}
    run = train_tiny(tmp_path, KEEP)
    (run / "best-rank0.pt").unlink()  # so that the checkpoint alone remembers
    train_tiny(tmp_path, KEEP, "max_duration=6ba", "autoresume=true")
    assert not (run / "best-rank0.pt").exists()
    train_tiny(tmp_path, KEEP, "max_duration=8ba", "autoresume=true")
    assert best_of(run) == checkpoint.BestScore(METRIC, 0.6, 8)


def test_a_better_file_than_the_newest_knows_is_kept(tmp_path, train_tiny, scores, monkeypatch):
    """A run that dies between the best checkpoint and its own goes on from an earlier step."""
    scores |= {2: 0.5, 4: 0.9}
    save = CheckpointSaver.batch_checkpoint

    def die(self, state, logger):
        if state.timestamp.batch.value == 4:
            raise RuntimeError("the machine is gone")
        save(self, state, logger)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSaver, "batch_checkpoint", die)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train_tiny(tmp_path, KEEP)
    run = tmp_path / "runs" / "tiny"
    assert best_of(run) == checkpoint.BestScore(METRIC, 0.9, 4)
    scores[4] = 0.7
    train_tiny(tmp_path, KEEP, "autoresume=true")
    assert checkpoint.find_checkpoint(run).resolve().name == "ba4-rank0.pt"
    assert best_of(run) == checkpoint.BestScore(METRIC, 0.9, 4)


def test_another_metric_starts_anew(tmp_path, train_tiny, scores, monkeypatch):
    scores |= {2: 0.9, 4: 0.8, 6: 0.1}
    run = train_tiny(tmp_path, KEEP)
    other = f"data.eval=[{{name: other, kind: sts, path: {tmp_path / 'x.csv'}}}]"
    (tmp_path / "x.csv").write_text("a dog,a cat,1\na man,a red book,3\n")
    monkeypatch.setattr(evaluation_callback, "_similarity", lambda _: {"other/cosine_spearman": 0})
    keep = "evaluation.keep_best=other/cosine_spearman"
    train_tiny(tmp_path, other, keep, "max_duration=6ba", "autoresume=true")
    assert best_of(run) == checkpoint.BestScore("other/cosine_spearman", 0, 6)


def test_a_run_from_the_beginning_forgets_an_earlier_attempt(tmp_path, train_tiny, scores):
    scores |= {2: 0.9, 4: 0.1}
    run = train_tiny(tmp_path, KEEP, "save_interval=4ba")
    for path in run.glob("[bl]a*-rank0.pt"):
        path.unlink()
    assert [path.name for path in run.glob("*.pt")] == ["best-rank0.pt"]
    scores |= {2: 0.4}
    train_tiny(tmp_path, KEEP, "autoresume=true")
    assert best_of(run) == checkpoint.BestScore(METRIC, 0.4, 2)


def test_the_file_is_always_whole(tmp_path, train_tiny, scores, monkeypatch):
    scores |= {2: 0.3, 4: 0.5}
    save = best_checkpoint.save_checkpoint

    def die(state, filename, **arguments):
        if state.timestamp.batch.value == 4:
            Path(filename).write_bytes(b"half of")
            raise RuntimeError("the disk is full")
        save(state, filename, **arguments)

    monkeypatch.setattr(best_checkpoint, "save_checkpoint", die)
    with pytest.raises(RuntimeError, match="the disk is full"):
        train_tiny(tmp_path, KEEP)
    run = tmp_path / "runs" / "tiny"
    assert checkpoint.load_trained_model(run / "best-rank0.pt").batch == 2


def test_other_ranks_write_nothing_and_follow_the_first(tmp_path, monkeypatch):
    dist = best_checkpoint.dist
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    # This rank has rounded to another side of the best score than the first one.
    monkeypatch.setattr(dist, "all_gather_object", lambda own: [0.25, own])
    best = best_checkpoint.BestCheckpoint("a/b", tmp_path)
    best.best = checkpoint.BestScore("a/b", 0.3, 1)
    best.update({"a/b": 0.31}, None)
    assert best.best == checkpoint.BestScore("a/b", 0.3, 1)
    state = torch.nn.Module()  # never asked for its time: there is no file here
    monkeypatch.setattr(
        dist, "all_gather_object", lambda own: [checkpoint.BestScore("a/b", 0.7, 2), own]
    )
    best.start(state)
    assert best.best == checkpoint.BestScore("a/b", 0.7, 2)
    assert list(tmp_path.iterdir()) == []
