"""Several models side by side."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.stats import t as student

from bge_pruning.reports import comparison, comparison_report
from bge_pruning.reports.comparison import Estimate, Ratio, estimate_mean, read_candidates

BASELINES = {("sts", "dense"): 0.8, ("scifact", "dense"): 0.5, ("scifact", "all"): 0.6}


def write(folder: Path, share: float, encoder: int = 5_000_000, **changes) -> Path:
    """Write the evaluation of a model that keeps the same share of every score."""
    tasks = []
    for (task, mode), baseline in BASELINES.items():
        scores = {"value": share * baseline, "baseline": baseline, "floor": baseline / 4}
        tasks.append({"task": task, "mode": mode, "main": True, "retention": share, **scores})
    tasks.append({**tasks[0], "main": False, "value": 0.0})
    sizes = {"model": encoder, "baseline": 10_000_000}
    parameters = {key: {"encoder": n, "total": n + 1_000_000} for key, n in sizes.items()}
    latency, rate = {"ratio": encoder / 1e7}, {"ratio": 1e7 / encoder}
    speed = {"latency_ms": latency, "throughput_texts_per_s": rate}
    evaluation = {"tasks": tasks, "parameters": parameters, "speed": speed, **changes}
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def change(folder: Path, damage: Callable[[dict], object]) -> str:
    file = folder / "evaluation.json"
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def results(tmp_path) -> list[str]:
    half, other = write(tmp_path / "half", 0.96), write(tmp_path / "half2", 0.98)
    quarter = write(tmp_path / "quarter", 0.9, 2_500_000)
    return [f"half={half}", f"half={other / 'evaluation.json'}", str(quarter)]


def test_the_original_comes_first_in_tables_and_the_picture(results):
    (original, half, quarter), keys, left_out = read_candidates(results)
    assert left_out == {}
    assert keys == list(BASELINES)
    assert (original.name, original.kept, str(original.latency)) == ("original", [1.0], "1.00 x")
    assert (original.encoder, original.total) == (10_000_000, 11_000_000)
    assert original.scores["sts", "dense"] == [0.8]
    assert (quarter.name, quarter.latency, quarter.throughput) == (
        "quarter",
        Ratio(0.25),
        Ratio(4.0),
    )
    assert quarter.kept == pytest.approx([0.9])
    assert quarter.floor == pytest.approx(0.25)
    assert half.kept == pytest.approx([0.96, 0.98])
    assert half.scores["scifact", "all"] == pytest.approx([0.576, 0.588])
    candidates = read_candidates(results).candidates
    figure = comparison_report.draw_comparison(candidates)
    assert len(figure.axes) == 2
    for panel in figure.axes:
        assert {text.get_text() for text in panel.texts} == {"original", "half", "quarter"}
    rows = [
        dict(zip(comparison.summary_header(), row, strict=True))
        for row in comparison.summary_rows(candidates)
    ]
    costs = {"encoder": "5.0M", "in all": "6.0M", "time of one text": "0.50 x"}
    shares = {"texts per second": "2.00 x", "floor": "25.0%", "kept": "97.0% (96.0% to 98.0%)"}
    assert rows[1] == {"model": "half", "runs": "2", **costs, **shares}
    assert (rows[2]["kept"], rows[2]["time of one text"]) == ("90.0%", "0.25 x")
    text = comparison_report.render_comparison(read_candidates(results))
    assert "| model | sts, dense | scifact, dense | scifact, all |" in text
    assert "| original | 0.8000 | 0.5000 | 0.6000 |" in text
    assert "| half | 0.7760 (0.7680 to 0.7840) |" in text
    found = comparison_report.describe_comparison(read_candidates(results))
    described = json.loads(json.dumps(found))
    assert described["tasks"][2] == {"task": "scifact", "mode": "all"}


def test_only_common_tasks_are_compared(tmp_path):
    first, second = (write(tmp_path / name, 0.9) for name in "ab")
    change(second, lambda c: c.update(tasks=c["tasks"][1:2]))
    found = read_candidates([str(first), str(second)])
    assert found.keys == [("scifact", "dense")]
    assert len(found.candidates) == 3
    assert found.left_out == {("sts", "dense"): ["b"], ("scifact", "all"): ["b"]}
    sentence = "Left out, because b lacks them: sts (dense), scifact (all)."
    assert sentence in comparison_report.render_comparison(found)
    lacking = {"task": "sts", "mode": "dense", "not_in": ["b"]}
    assert comparison_report.describe_comparison(found)["left_out"][0] == lacking
    change(second, lambda c: c["tasks"][0].update(task="elsewhere"))
    with pytest.raises(ValueError, match="have no task and mode in common. To fix, evaluate all"):
        read_candidates([str(first), str(second)])


def test_speed_that_was_not_measured(tmp_path):
    candidates, *_ = read_candidates([str(write(tmp_path / "a", 0.9, speed=None))])
    assert [c.latency for c in candidates] == [None, None]
    assert comparison.summary_rows(candidates)[1][4:6] == ["-", "-"]
    (panel,) = comparison_report.draw_comparison(candidates).axes
    assert {text.get_text() for text in panel.texts} == {"original", "a"}


def test_speeds_have_their_quartiles(tmp_path):
    paths = []
    for name, spread in (("a", [0.4, 0.6]), ("b", [0.45, 0.7])):
        figures = {"ratio": 0.5, "ratio_iqr": spread}
        speed = {"latency_ms": figures, "throughput_texts_per_s": figures}
        paths.append(str(write(tmp_path / name, 0.9, speed=speed)))
    one = read_candidates(paths[:1]).candidates
    assert comparison.summary_rows(one)[1][4] == "0.50 x (0.40 to 0.60)"
    both = read_candidates([f"x={path}" for path in paths]).candidates
    assert both[1].throughput == Ratio(0.5, (0.4, 0.7))


def test_means_over_seeds_and_the_front():
    found = estimate_mean([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 * 1.0 / 3**0.5, rel=1e-6)
    low, high = student.interval(0.95, 2, loc=2.0, scale=1 / 3**0.5)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))

    assert estimate_mean([0.5]) == Estimate(0.5, None, 1)
    assert estimate_mean([]) is None
    assert comparison.percent(Estimate(0.98765, 0.00321, 3)) == "98.8 ± 0.3"
    assert comparison.percent(Estimate(0.98765, None, 1), 2) == "98.77"
    assert comparison.percent(None) == "-"
    assert comparison.pareto_front([3, 1, 2], [0.9, 0.5, 0.8]) == [1, 2, 0]
    assert comparison.pareto_front([3, 1, 2], [0.9, 0.9, 0.8]) == [1]
    assert comparison.pareto_front([1, 1, 2], [0.5, 0.7, 0.7]) == [1]
    assert comparison.pareto_front([1], [0.1]) == [0]


def test_files_that_cannot_be_compared(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json: no such file\. To fix, give a"):
        read_candidates([str(tmp_path)])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x.json: has no tasks, .* To fix, run .* --baseline"):
        read_candidates([str(tmp_path / "x.json")])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("speed"), "has no speed"),
        (lambda c: c["speed"].pop("latency_ms"), "has no speed.latency_ms"),
        (lambda c: c["speed"]["latency_ms"].update(ratio=0), "ratio is 0, expected a number above"),
        (lambda c: c["parameters"].update(model=None), "parameters.model is null, expected an obj"),
        (lambda c: c["parameters"]["baseline"].pop("total"), "has no parameters.baseline.total"),
        (lambda c: c["tasks"][0].pop("floor"), r"has no tasks\[0\].floor"),
        (lambda c: c["tasks"][0].pop("baseline"), r"has no tasks\[0\].baseline"),
        (
            lambda c: c["tasks"][0].update(retention=None),
            "scores without a share of the original's",
        ),
    ],
)
def test_values_of_another_kind_are_named(damage, message, tmp_path):
    folder = change(write(tmp_path / "a", 0.9), damage)
    with pytest.raises(
        ValueError, match=rf"evaluation.json:? .*{message}.* To fix, run .*baseline"
    ):
        read_candidates([folder])


def test_names(tmp_path, monkeypatch):
    paths = [write(tmp_path / name, 0.9) for name in ("half", "a=b", "more/original")]
    (tmp_path / "single.json").write_bytes((paths[0] / "evaluation.json").read_bytes())
    named = {
        str(paths[0] / "evaluation.json"): "half",
        str(paths[1]): "a=b",
        f"x={paths[1]}": "x",
        f"x={paths[1] / 'evaluation.json'}": "x",
        f"{paths[0]}/": "half",
        str(tmp_path / "single.json"): "single",
    }
    for text, name in named.items():
        assert read_candidates([text])[0][1].name == name
    monkeypatch.chdir(paths[0])
    assert read_candidates(["."])[0][1].name == "half"
    assert read_candidates(["evaluation.json"])[0][1].name == "half"
    for text in (str(paths[2]), f"original={paths[0]}"):
        with pytest.raises(ValueError, match="would be called original, as the model .* To fix"):
            read_candidates([text])
    twice = [str(paths[0]), f"x={paths[0] / 'evaluation.json'}"]
    with pytest.raises(ValueError, match="evaluation.json is there twice: .* To fix, name it once"):
        read_candidates(twice)


def test_runs_that_do_not_belong_together(tmp_path, monkeypatch):
    sizes = [write(tmp_path / str(size), 0.9, size) for size in (5_000_000, 6_000_000)]
    message = "runs called x have 6000000 and 7000000 parameters: they are no repetitions. To fix"
    with pytest.raises(ValueError, match=message):
        read_candidates([f"x={folder}" for folder in sizes])
    first = write(tmp_path / "a", 0.9)
    monkeypatch.setitem(BASELINES, ("sts", "dense"), 0.7)
    second = write(tmp_path / "b", 0.9)
    message = r"have different originals: on sts \(dense\) they score 0.8000 and 0.7000. To fix"
    with pytest.raises(ValueError, match=message):
        read_candidates([str(first), str(second)])
