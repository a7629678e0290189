"""The shares, verdicts, tables, picture and files of a study."""

import json
from pathlib import Path

import numpy as np
import pytest

from bge_pruning.reports import study_summary
from bge_pruning.reports.comparison import Estimate
from bge_pruning.reports.comparison_report import draw_study, summarise, write_study_report
from bge_pruning.reports.study_records import StudyCell, StudyReference, read_cells, read_reference
from bge_pruning.reports.study_summary import find_keys, group_cells, render_study

STUDIES = sorted((Path(__file__).parents[2] / "experiments" / "results").glob("quality*"))
KEYS = [("sts", "dense"), ("docs", "dense")]
SIZES = (("most", 0.99), ("half", 0.96))


def make_cell(method, size, seed, sts, docs, share=0.5):
    scores = make_scores(sts, docs)
    scores = [{**s, "value": 0.8 * s["value"], "retention": s["value"]} for s in scores]
    cell = {"method": method, "size": size, "seed": seed, "config": {"method": method}}
    cell |= {"parameters": {"encoder": int(share * 1e6), "total": 2_000_000}}
    known = read_cells(STUDIES[0])[0].as_dict()
    return StudyCell.model_validate({**known, **cell, "encoder_share": share, "scores": scores})


def make_scores(sts, docs):
    first = {"task": "sts", "kind": "similarity", "metric": "cosine_spearman", "value": sts}
    second = {"task": "docs", "kind": "retrieval", "metric": "ndcg_at_10", "value": docs}
    return [{"mode": "dense", **score} for score in (first, second)]


SCORES = {"original": make_scores(0.8, 0.8), "word_embeddings": make_scores(0.6, 0.2)}
SCORES["random_weights"] = make_scores(0.4, 0.3)
REFERENCE = StudyReference.model_validate(
    {**read_reference(STUDIES[0]).as_dict(), "scores": SCORES}
)
CELLS = [
    make_cell("random", "half", 1, 0.90, 0.80),
    make_cell("random", "half", 2, 0.92, 0.82),
    make_cell("l0", "half", 2, 0.98, 0.96),
    make_cell("l0", "half", 1, 0.96, 0.94),
    make_cell("l0", "large", 1, 0.99, 0.98, share=0.75),
]


def test_groups_kinds_and_verdicts():
    groups = group_cells(CELLS)
    names = [("large", "l0"), ("half", "l0"), ("half", "random")]
    assert [(g.size, g.method) for g in groups] == names
    assert [cell.seed for cell in groups[1].cells] == [1, 2]
    assert [group.learned for group in groups] == [True, True, False]
    assert study_summary.keys_by_kind(CELLS, KEYS) == {
        "all": KEYS,
        "similarity": KEYS[:1],
        "retrieval": KEYS[1:],
    }
    assert study_summary.keys_by_kind(CELLS, KEYS[:1]) == {"all": KEYS[:1]}
    assert study_summary.judge(Estimate(0.02, 0.01, 3)) == "above"
    assert study_summary.judge(Estimate(-0.02, 0.01, 3)) == "below"
    assert study_summary.judge(Estimate(0.01, 0.02, 3)) == "a tie"
    assert study_summary.judge(Estimate(0.02, None, 1)) == "one seed: not known"


def test_what_is_kept_by_hand_and_differences_are_paired_by_seed():
    keys = find_keys(CELLS)
    assert keys == KEYS
    assert study_summary.kept_of(CELLS[0], keys) == pytest.approx(0.85)
    assert study_summary.kept_of(CELLS[0], [("docs", "dense")]) == 0.80
    unknown = make_cell("l0", "half", 1, 0.9, 0.9)
    unknown.scores[0].retention = None
    assert study_summary.kept_of(unknown, keys) is None
    unknown.scores = unknown.scores[1:]
    assert find_keys([*CELLS, unknown]) == KEYS[1:]  # only common tasks count
    floors = study_summary.floor_shares(REFERENCE)
    assert floors == pytest.approx({KEYS[0]: 0.75, KEYS[1]: 0.375})  # of the better one
    large, ours, theirs = group_cells(CELLS)
    found = study_summary.compare_groups(ours, theirs, KEYS)
    # 0.95 - 0.85 of seed 1, 0.97 - 0.87 of seed 2.
    assert (found.mean, found.half, found.count) == pytest.approx((0.1, 0.0, 2), abs=1e-9)
    assert study_summary.compare_groups(large, theirs, KEYS) == Estimate(
        pytest.approx(0.135), None, 1
    )
    assert "Against the baselines" not in render_study(CELLS[2:], REFERENCE)  # without one


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_the_tables_of_the_studies_in_this_repository(folder):
    cells, reference = read_cells(folder), read_reference(folder)
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert table.startswith(render_study(cells, reference))
    assert summarise(cells, reference) == json.loads((folder / "summary.json").read_text())


def test_the_picture_shows_the_numbers_and_the_floor_or_says_that_it_is_far_below():
    figure = draw_study(CELLS, REFERENCE)
    panels = figure.axes
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles == ["All tasks and modes", "Similarity", "Retrieval"]
    lines = {line.get_label(): line for line in panels[0].lines}
    assert list(lines["floor"].get_ydata()) == pytest.approx([56.25, 56.25])
    # Beside each other: l0 a little to the left of its size, random to the right.
    drawn = np.array([[0.5, 96.0], [0.75, 98.5]])
    assert lines["l0"].get_xydata() == pytest.approx(drawn, abs=2e-3)
    assert lines["random"].get_xydata() == pytest.approx(np.array([[0.5, 86.0]]), abs=2e-3)
    assert lines["l0"].get_xdata()[0] < 0.5 < lines["random"].get_xdata()[0]
    dots = {tuple(y) for line in panels[0].lines if len(y := line.get_ydata()) == 2}
    assert any(sorted(y) == pytest.approx([95.0, 97.0]) for y in dots)  # the two seeds of l0
    cells = [make_cell("l0", size, 1, share, share - 0.13, share) for size, share in SIZES]
    figure = draw_study(cells, REFERENCE)
    drawn = ["floor" in {line.get_label() for line in panel.lines} for panel in figure.axes]
    assert drawn == [False, False, True]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["l0", "floor"]
    near = [make_cell("l0", size, 1, share, share, share) for size, share in SIZES]
    figure = draw_study(near, REFERENCE)
    for panel in figure.axes:
        assert "floor" not in {line.get_label() for line in panel.lines}
        assert panel.get_ylim()[0] > 90
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["floor: 56 %, far below"]


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ([("l0", "half"), ("random", "half")], ["l0", "random"]),
        ([("l0", "flat"), ("l0", "narrow")], ["flat", "narrow"]),
        ([("l0", "flat"), ("random", "flat"), ("l0", "narrow")],
         ["l0, flat", "random, flat", "l0, narrow"]),
    ],
)  # fmt: skip
def test_models_of_one_size_are_rows_named_by_what_differs(groups, names):
    kept = [0.99, 0.96, 0.93]
    cells = [
        make_cell(method, size, seed, kept[n] + 0.002 * seed, kept[n])
        for n, (method, size) in enumerate(groups)
        for seed in (0, 1)
    ]
    figure = draw_study(cells, REFERENCE)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names
    panel = figure.axes[1]  # of similarity alone
    assert panel.yaxis_inverted()
    drawn = [line.get_xydata() for line in panel.lines]
    means = {points[0][1]: points[:, 0] for points in drawn if len(points) == 1}
    assert means == {n: pytest.approx([100 * kept[n] + 0.1]) for n in range(len(groups))}
    assert figure.axes[0].get_xlabel() == "kept of the original's score (%)\nfloor: 56 %, far below"


def test_files_of_a_report(tmp_path):
    (tmp_path / "cells").mkdir()
    for number, cell in enumerate(CELLS):
        (tmp_path / "cells" / f"{number}.json").write_text(json.dumps(cell.as_dict()))
    (tmp_path / "reference.json").write_text(json.dumps(REFERENCE.as_dict()))
    assert write_study_report(tmp_path) == tmp_path / "table.md"
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("## What is kept") and "(pareto.png)" in text
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == summarise(CELLS, REFERENCE)
    assert summary["groups"][1]["kept"]["mean"]["mean"] == pytest.approx(0.96)
    assert summary["floor"]["mean"] == pytest.approx(0.5625)
    assert write_study_report(tmp_path).read_text() == text  # again


def test_reports_that_cannot_be_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cells: holds no finished cell\. To fix, run"):
        write_study_report(tmp_path)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json: has no method, size.* To fix, remove the fil"):
        write_study_report(tmp_path)
    (tmp_path / "cells" / "a.json").write_text(json.dumps(CELLS[0].as_dict()))
    with pytest.raises(FileNotFoundError, match=r"reference\.json: no such file\. To fix"):
        write_study_report(tmp_path)
    earlier = {
        **REFERENCE.as_dict(),
        "scores": {**SCORES, "word_embeddings": SCORES["original"][1:]},
    }
    (tmp_path / "reference.json").write_text(json.dumps(earlier))
    message = (
        "word_embeddings has no score of sts, dense. To fix, remove the file and run the study"
    )
    with pytest.raises(ValueError, match=message):
        write_study_report(tmp_path)
    (tmp_path / "reference.json").write_text(json.dumps(REFERENCE.as_dict()))
    apart = CELLS[1].as_dict()
    apart["scores"] = [{**apart["scores"][0], "task": "other"}]
    (tmp_path / "cells" / "b.json").write_text(json.dumps(apart))
    with pytest.raises(ValueError, match=r"the cells have no task in common\. To fix, keep"):
        write_study_report(tmp_path)
