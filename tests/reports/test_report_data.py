"""Curves of logged numbers, and the files that a report is made from."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bge_pruning.reports import report_data
from bge_pruning.reports.report_data import MAX_POINTS, HistoryRow, collect_series, read_inputs


def keys(*names):
    return {name: ([0, 1], [0.1, 0.2]) for name in names}


@pytest.fixture
def rows(make_history):
    return [HistoryRow.model_validate(row) for row in make_history()]


def test_rows_become_curves_in_order_of_batch(rows):
    assert collect_series(rows[::-1]) == collect_series(rows)
    batches, values = collect_series(rows)["loss/train/distillation_alignment"]
    assert batches == list(range(1, 40))
    assert values == [1 / batch for batch in batches]
    values = [1.0, math.nan, math.inf, "text", None, 2]
    rows = [HistoryRow(batch=n, metrics={"a": value}) for n, value in enumerate(values)]
    assert collect_series(rows) == {"a": ([0, 5], [1.0, 2])}


def test_axes_losses_scores_and_the_last_constraint(rows):
    prefix = "pruning/expected_sparsity/"
    found = report_data.pruned_axes(
        keys(*(prefix + axis for axis in ("new", "encoder", "head", "layer")))
    )
    assert found == ["layer", "head", "encoder", "new"]
    # Losses are the parts without the constraint.
    parts = ("loss/train/cosent", "loss/train/distillation_sparse")
    assert report_data.task_losses(
        keys("loss/train/total", *parts, "loss/train/lagrangian")
    ) == list(parts)
    assert report_data.task_losses(keys("loss/train/total")) == ["loss/train/total"]
    assert report_data.task_losses(keys("eval/dev/spearman")) == []
    main = {
        "stsb": "eval/stsb/cosine_spearman",
        "stsb, colbert": "eval/stsb/colbert_spearman",
        "scifact": "eval/scifact/ndcg_at_10",
        "scifact, sparse": "eval/scifact/sparse_ndcg_at_10",
        "scifact, dense+sparse": "eval/scifact/dense+sparse_ndcg_at_10",
        "a/b, all": "eval/a/b/all_ndcg_at_10",
    }
    others = ("eval/scifact/mrr_at_10", "eval/stsb/cosine_pearson", "metrics/x/MeanError")
    assert report_data.logged_scores(keys(*others, *main.values())) == main
    for name in ("SpearmanCorrCoef", "cosine_spearman"):  # the new key goes before the old one
        old, new, other = f"metrics/dev/{name}", "eval/dev/cosine_spearman", f"metrics/other/{name}"
        assert report_data.logged_scores(keys(old)) == {"dev": old}
        assert report_data.logged_scores(keys(old, new)) == {"dev": new}
        assert report_data.logged_scores(keys(other, new)) == {"dev": new, "other": other}
    constraint = report_data.last_constraint(collect_series(rows))
    head = constraint["head"]
    assert head.expected_sparsity == pytest.approx(0.49)
    assert (head.target_sparsity, head.realised_sparsity) == (0.5, 0.5)
    # The encoder has no target of its own: it is held to what would be cut.
    assert constraint["encoder"].target_sparsity == 0.5
    assert report_data.last_constraint({}) == {}


@pytest.mark.parametrize("count", [0, 1, MAX_POINTS, MAX_POINTS + 1, 15_000])
def test_thinning_keeps_the_ends(count):
    batches, values = report_data.thin(range(count), [2 * n for n in range(count)])
    assert len(batches) == min(count, MAX_POINTS)
    assert batches == sorted(set(batches))
    assert values == [2 * batch for batch in batches]
    if count:
        assert (batches[0], batches[-1]) == (0, count - 1)


def test_quantiles_of_a_window():
    places, quantiles = report_data.running_quantiles([5.0] * 30 + [1.0] * 30)
    assert places == list(range(60))
    assert quantiles[0] == [5, 5, 5] and quantiles[-1] == [1, 1, 1]
    assert quantiles[30] == [1, 1, 5]  # half of the window is on either side
    assert report_data.running_quantiles([3.0]) == ([0], [[3, 3, 3]])


def test_all_is_read_and_given_commands_win(results, make_evaluation, make_pruning, monkeypatch):
    monkeypatch.chdir(results)
    inputs = read_inputs(Path())
    assert inputs.name == "half"
    assert inputs.evaluation.as_dict() == make_evaluation()
    assert inputs.pruning.as_dict() == make_pruning()
    assert inputs.series["loss/train/total"][0][:3] == [0, 1, 2]
    assert list(inputs.recovery) == ["loss/train/total"]
    assert set(inputs.gates) == set(inputs.kept) == {"layer", "head", "intermediate", "hidden"}
    assert inputs.kept["layer"].tolist() == [True, False, False, True]
    assert inputs.config.as_dict() == {"run_name": "half", "seed": 17}
    assert inputs.commands == ["python scripts/train.py a.yaml", "python b.py"]
    assert inputs.missing == []
    for text in ("python a.py\n\n  \npython b.py", "\r\npython a.py\r\npython b.py\r\n"):
        (results / "commands.txt").write_text(text)
        assert read_inputs(results).commands == ["python a.py", "python b.py"]
    assert read_inputs(results, ["make all"]).commands == ["make all"]
    (results / "commands.txt").unlink()
    inputs = read_inputs(results)
    assert inputs.commands == ["python scripts/evaluate_model.py results/half"]
    assert inputs.missing == ["commands.txt"]
    (results / "evaluation.json").unlink()
    assert read_inputs(results).commands == []


def test_a_run_folder_is_enough(run_folder):
    inputs = read_inputs(run_folder)
    assert inputs.missing == ["evaluation.json", "pruning.json", "metrics-recovery.jsonl"]
    assert inputs.versions == {"python": "3.11.0", "torch": "2.7.0"}
    (run_folder / "metrics.jsonl").unlink()
    message = r"my-run holds neither evaluation\.json nor pruning\.json nor metrics\.jsonl\. To fix"
    with pytest.raises(FileNotFoundError, match=message):
        read_inputs(run_folder)


@pytest.mark.parametrize("name", ["evaluation.json", "pruning.json", "versions.json"])
def test_json_that_cannot_be_used(name, results):
    for content, message in (
        (b'{"a"', r"is not JSON \(Expecting ':' delimiter\)\. To fix, write it again"),
        (b"[1, 2]", r"it is a list, expected an object with keys\. To fix, write it again"),
    ):
        (results / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            read_inputs(results)


def test_history_that_cannot_be_read(results):
    path = results / "metrics.jsonl"
    path.write_text('{"batch": 1, "metrics": {}}\n\n{"batch"')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3: is not JSON .* To fix, remove"):
        read_inputs(results)
    for row, message in (
        ({"batch": 1}, "has no metrics"),
        ([1], "it is a list, expected an object with keys"),
        ({"batch": 1, "metrics": 3}, "metrics is 3, expected an object with keys"),
        ({"batch": "1", "metrics": {}}, 'batch is "1", expected a whole number'),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(ValueError, match=rf"metrics\.jsonl:1: {message}.* To fix, remove the"):
            read_inputs(results)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not an archive", "code"])
def test_gates_that_cannot_be_read(content, results):
    if content == "code":  # is not run
        np.savez(results / "gates.npz", layer=np.array([{"a": 1}], dtype=object))
    else:
        (results / "gates.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"gates\.npz holds no arrays .*To fix"):
        read_inputs(results)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "is not YAML .* To fix, write it again"),
        ("[" * 100_000, r"is not YAML \(nested more than 50 levels"),
        ("model: {base_model: 3}", "model.base_model is 3, expected a text"),
        ("- a", "it is a list, expected an object"),
    ],
    ids=["cut", "deep", "number", "list"],
)
def test_a_configuration_that_cannot_be_read(content, message, results):
    (results / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.yaml: {message}"):
        read_inputs(results)
