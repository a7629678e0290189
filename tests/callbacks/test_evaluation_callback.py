"""Evaluation during training: the scores, their time and place, and what they leave alone."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer.core import Callback

from bge_pruning.callbacks import evaluation_callback
from bge_pruning.callbacks.evaluation_callback import EvaluationCallback
from bge_pruning.config.names import list_metric_keys
from bge_pruning.evaluation.scoring import RETRIEVAL_METRICS, score_tasks
from bge_pruning.evaluation.tasks import beir_task
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.export.extract import extract
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.training import builders
from tests.common.trainings import logged, read_metrics


@pytest.fixture(scope="module")
def sources(sts_csv, collection) -> dict[str, str]:
    """Held-out data, as overrides."""
    pairs = f"{{name: dev, kind: sts, path: {sts_csv}}}"
    beir = f"{{name: docs, kind: beir, path: {collection}, split: test}}"
    return {
        "both": f"data.eval=[{pairs}, {beir}]",
        "pairs": f"data.eval=[{pairs}]",
        "beir": f"data.eval=[{beir}]",
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_tiny, sources) -> Path:
    """Three steps, evaluated after two and three, in two modes."""
    heads = ("loss.distillation_sparse=1", "loss.distillation_colbert=1")
    folder = tmp_path_factory.mktemp("evaluated")
    modes = "evaluation.modes=[dense, all]"
    return train_tiny(folder, sources["both"], *heads, "max_duration=3ba", modes)


def test_everything_is_logged_under_the_names_of_the_table(run):
    keys = {key for row in read_metrics(run) for key in row["metrics"] if key.startswith("eval/")}
    expected = {f"eval/docs/{mode}{name}" for mode in ("", "all_") for name in RETRIEVAL_METRICS}
    assert keys == expected | {"eval/dev/cosine_spearman", "eval/seconds"}
    promised = {f"eval/{key}" for key in list_metric_keys(["dev"], ["docs"], ["dense", "all"])}
    assert promised == keys - {"eval/seconds"}
    table = re.findall(r"``(eval/\S+)``", EvaluationCallback.__doc__)
    named = {re.sub("docs|dev", "<task>", key) for key in keys if "/all_" not in key}
    assert set(table) == named | {"eval/<task>/<mode>_<metric>"}
    assert all(logged(run, key).keys() == {2, 3} for key in keys)
    theirs = logged(run, "metrics/dev/cosine_spearman")  # as Composer computed it
    assert logged(run, "eval/dev/cosine_spearman") == theirs
    assert theirs[2] != theirs[3]


def test_retrieval_is_that_of_the_extracted_model(run, tmp_path, collection):
    extract(run, tmp_path / "small")
    encoder = TextEncoder(load_base_model(str(tmp_path / "small")), max_length=16)
    found = score_tasks(encoder, [beir_task(collection)], ["dense", "all"])
    for mode, prefix in (("dense", ""), ("all", "all_")):
        for metric in RETRIEVAL_METRICS:
            value = logged(run, f"eval/docs/{prefix}{metric}")[3]
            assert value == found["tiny", mode].values[metric]


def test_the_line(run):
    scores = [logged(run, f"eval/{key}") for key in ("dev/cosine_spearman", "docs/ndcg_at_10")]
    seconds, text = logged(run, "eval/seconds"), (run / "train.log").read_text()
    assert text.count("| evaluation |") == 2
    assert re.findall(r"step \d+ \| evaluating .*", text) == ["step 2 | evaluating dev, docs"]
    for batch in (2, 3):
        assert (
            f"step {batch} | evaluation | dev/cosine_spearman {scores[0][batch]:.4f} | "
            f"docs/ndcg_at_10 {scores[1][batch]:.4f} | docs/all_ndcg_at_10 "
        ) in text
        assert f" | {seconds[batch]:.1f} s\n" in text


@pytest.mark.parametrize(
    ("duration", "interval", "batches"), [("5ba", "2ba", [2, 4, 5]), ("4ba", "0.5dur", [2, 4])]
)
def test_both_kinds_are_evaluated_together(
    duration, interval, batches, tmp_path, train_tiny, sources
):
    times = (f"max_duration={duration}", f"eval_interval={interval}")
    run = train_tiny(tmp_path, sources["both"], *times)
    for key in ("metrics/dev/cosine_spearman", "eval/docs/ndcg_at_10", "eval/seconds"):
        assert list(logged(run, key)) == batches


def test_collections_alone_and_nothing_to_evaluate(tmp_path, train_tiny, sources):
    run = train_tiny(tmp_path / "nothing", "data.eval=[]", "max_duration=2ba")
    assert not any(key.startswith("eval/") for row in read_metrics(run) for key in row["metrics"])
    assert "| evaluation |" not in (run / "train.log").read_text()
    run = train_tiny(tmp_path / "beir", sources["beir"], "max_duration=2ba")
    assert logged(run, "eval/docs/ndcg_at_10").keys() == {2}
    assert logged(run, "eval/seconds")[2] > 0
    assert not logged(run, "eval/dev/cosine_spearman")


def test_the_time_is_that_of_pairs_and_collections(tmp_path, train_tiny, sources, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(evaluation_callback, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def slow(function, seconds):
        def run(*arguments, **keywords):
            clock.now += seconds
            return function(*arguments, **keywords)

        return run

    monkeypatch.setattr(ComposerBGEM3, "eval_forward", slow(ComposerBGEM3.eval_forward, 60.0))
    monkeypatch.setattr(evaluation_callback, "score_tasks", slow(score_tasks, 1.0))
    monkeypatch.setattr(ComposerBGEM3, "loss", slow(ComposerBGEM3.loss, 1e6))
    run = train_tiny(tmp_path, sources["both"])
    assert logged(run, "eval/seconds") == {2: 301.0, 4: 301.0}  # five batches of pairs


@pytest.fixture
def encoders(monkeypatch) -> list[TextEncoder]:
    seen = []

    def build(*arguments):
        seen.append(TextEncoder(*arguments))
        return seen[-1]

    monkeypatch.setattr(evaluation_callback, "TextEncoder", build)
    return seen


@pytest.mark.parametrize("at_target", [True, False])
def test_gates_are_those_of_the_model_evaluated(at_target, tmp_path, train_tiny, sources, encoders):
    target = f"model.l0_module.eval_target_model={str(at_target).lower()}"
    train_tiny(tmp_path, sources["beir"], target, "eval_batch_size=5", "max_duration=2ba")
    (encoder,) = encoders
    # The target is 24 of 32; after two steps hardly anything is off.
    assert int(encoder.masks.hidden.sum()) == (24 if at_target else 32)
    assert set(encoder.masks.hidden.unique().tolist()) <= {0.0, 1.0}
    assert (encoder.batch_size, encoder.max_length) == (5, 16)


def test_without_gates_and_with_a_length_of_its_own(tmp_path, train_tiny, sources, encoders):
    length = "evaluation.max_length=7"
    run = train_tiny(tmp_path, sources["beir"], "model.l0_module=null", length, "max_duration=2ba")
    (encoder,) = encoders
    assert (encoder.masks, encoder.max_length) == (None, 7)
    assert logged(run, "eval/docs/ndcg_at_10").keys() == {2}


def test_weights_are_those_of_a_run_without_it(
    tmp_path, train_tiny, sources, load_state, assert_same, monkeypatch
):
    """To the bit, with dropout, which draws from the random state that mteb sets."""
    fixed = ("model.dropout=0.2", "eval_interval=1ba")
    runs = {name: train_tiny(tmp_path / name, sources[name], *fixed) for name in ("both", "pairs")}
    runs["nothing"] = train_tiny(tmp_path / "nothing", "data.eval=[]", *fixed)
    monkeypatch.setattr(builders, "EvaluationCallback", lambda *_, **__: Callback())
    runs["no callback"] = train_tiny(tmp_path / "none", sources["both"], *fixed)
    states = {name: load_state(run) for name, run in runs.items()}
    for name in ("pairs", "nothing", "no callback"):
        for part in ("model", "optimizers"):
            assert_same(states["both"][part], states[name][part], 0.0, f"{name}: {part}")
    no_dropout = load_state(train_tiny(tmp_path / "dry", sources["both"], "model.dropout=0"))
    name = "backbone.encoder.layer.0.output.dense.weight"
    assert not torch.equal(no_dropout["model"][name], states["both"]["model"][name])
