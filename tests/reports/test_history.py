import math

import pytest

from bge_pruning.reports.report_data import (
    MAX_POINTS,
    collect_series,
    last_constraint,
    logged_scores,
    pruned_axes,
    running_quantiles,
    task_losses,
    thin,
)


def keys(*names):
    return {name: ([0, 1], [0.1, 0.2]) for name in names}


def test_rows_become_curves_in_order_of_batch(make_history):
    rows = make_history()
    assert collect_series(rows[::-1]) == collect_series(rows)
    batches, values = collect_series(rows)["loss/train/distillation_alignment"]
    assert batches == list(range(1, 40))
    assert values == [1 / batch for batch in batches]


def test_what_is_no_finite_number_is_left_out():
    values = [1.0, math.nan, math.inf, "text", None, 2]
    rows = [{"batch": n, "metrics": {"a": value}} for n, value in enumerate(values)]
    assert collect_series(rows) == {"a": ([0, 5], [1.0, 2])}


def test_axes_come_in_our_order_and_unknown_ones_last():
    prefix = "pruning/expected_sparsity/"
    found = pruned_axes(keys(*(prefix + axis for axis in ("new", "encoder", "head", "layer"))))
    assert found == ["layer", "head", "encoder", "new"]


def test_losses_are_the_parts_without_the_constraint():
    parts = ("loss/train/cosent", "loss/train/distillation_sparse")
    assert task_losses(keys("loss/train/total", *parts, "loss/train/lagrangian")) == list(parts)
    assert task_losses(keys("loss/train/total")) == ["loss/train/total"]
    assert task_losses(keys("eval/dev/spearman")) == []


def test_scores_are_the_main_ones_of_each_task_and_mode():
    main = {
        "stsb": "eval/stsb/cosine_spearman",
        "stsb, colbert": "eval/stsb/colbert_spearman",
        "scifact": "eval/scifact/ndcg_at_10",
        "scifact, sparse": "eval/scifact/sparse_ndcg_at_10",
        "scifact, dense+sparse": "eval/scifact/dense+sparse_ndcg_at_10",
        "a/b, all": "eval/a/b/all_ndcg_at_10",
    }
    others = ("eval/scifact/mrr_at_10", "eval/stsb/cosine_pearson", "metrics/x/MeanError")
    assert logged_scores(keys(*others, *main.values())) == main


@pytest.mark.parametrize("name", ["SpearmanCorrCoef", "cosine_spearman"])
def test_the_new_key_goes_before_the_old_one(name):
    old, new = f"metrics/dev/{name}", "eval/dev/cosine_spearman"
    assert logged_scores(keys(old)) == {"dev": old}
    assert logged_scores(keys(old, new)) == {"dev": new}
    other = f"metrics/other/{name}"
    assert logged_scores(keys(other, new)) == {"dev": new, "other": other}


def test_the_last_constraint(make_history):
    constraint = last_constraint(collect_series(make_history()))
    assert constraint["head"] == pytest.approx(
        {"expected_sparsity": 0.49, "target_sparsity": 0.5, "realised_sparsity": 0.5}
    )
    # The encoder has no target of its own: what would be cut is what it is held to.
    assert constraint["encoder"]["target_sparsity"] == 0.5
    assert last_constraint({}) == {}


@pytest.mark.parametrize("count", [0, 1, MAX_POINTS, MAX_POINTS + 1, 15_000])
def test_thinning_keeps_the_ends(count):
    batches, values = thin(range(count), [2 * n for n in range(count)])
    assert len(batches) == min(count, MAX_POINTS)
    assert batches == sorted(set(batches))
    assert values == [2 * batch for batch in batches]
    if count:
        assert (batches[0], batches[-1]) == (0, count - 1)


def test_quantiles_of_a_window():
    places, quantiles = running_quantiles([5.0] * 30 + [1.0] * 30)
    assert places == list(range(60))
    assert quantiles[0] == [5, 5, 5] and quantiles[-1] == [1, 1, 1]
    assert quantiles[30] == [1, 1, 5]  # half of the window is on either side
    assert running_quantiles([3.0]) == ([0], [[3, 3, 3]])
