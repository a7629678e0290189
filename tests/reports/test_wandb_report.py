import pytest
from PIL import Image

from bge_pruning.reports.report import CAPTIONS
from bge_pruning.reports.wandb_report import log_report, log_scores

wandb = pytest.importorskip("wandb")


class Run:
    def __init__(self):
        self.logged, self.summary = {}, {}

    def log(self, values):
        self.logged |= values


def test_the_page_and_the_pictures_that_are_there(tmp_path):
    run = Run()
    (tmp_path / "report.html").write_text("<p>модель</p>", encoding="utf-8")
    for name in ("gates.png", "scores.png", "mine.png"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    log_report(run, tmp_path)
    assert set(run.logged) == {"report/page", "report/gates", "report/scores"}
    assert run.logged["report/page"].html == "<p>модель</p>"
    assert run.logged["report/gates"]._caption == CAPTIONS["gates.png"]


def test_scores_are_a_table_and_a_summary(make_record, make_entry):
    run = Run()
    log_scores(run, make_record([]))
    assert run.logged == run.summary == {}
    alone = make_entry("b", baseline=None, retention=None, retention_above_floor=None)
    other = make_entry("c", main=False, metric="cosine_pearson")
    log_scores(run, make_record([make_entry("a"), alone, other]))
    table = run.logged["scores"]
    assert table.columns[:3] == ["task", "mode", "metric"]
    assert [row[0] for row in table.data] == ["a", "b"]
    assert run.summary == {
        "scores/a/dense/cosine_spearman": 0.81,
        "scores/a/dense/cosine_spearman_kept": 0.81 / 0.82,
        "scores/b/dense/cosine_spearman": 0.81,
    }
