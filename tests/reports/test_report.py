"""The files that a report leaves, and what it refuses."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from bge_pruning.reports.report import write_report
from bge_pruning.reports.report_pictures import CAPTIONS

SCRIPT = Path(__file__).parents[2] / "scripts" / "write_report.py"
PNG = b"\x89PNG\r\n"


@pytest.fixture
def two(results):
    """The same with two pictures only, which are quick to draw."""
    for name in ("gates.npz", "metrics.jsonl", "metrics-recovery.jsonl"):
        (results / name).unlink()
    return results


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_report_has_two_texts_and_its_pictures(results):
    before = names(results)
    assert write_report(results) == results / "report.md"
    assert names(results) - before == {"report.md", "report.html", *CAPTIONS}
    text = (results / "report.md").read_text(encoding="utf-8")
    for name in CAPTIONS:
        assert f"]({name})" in text
        assert (results / name).read_bytes().startswith(PNG)
    assert "<title>Pruned whole</title>" in (results / "report.html").read_text(encoding="utf-8")


def test_only_pictures_that_the_folder_allows(run_folder):
    write_report(run_folder)
    drawn = {name for name in names(run_folder) if name.endswith(".png")}
    assert drawn == {"gates.png", "constraint.png", "multipliers.png", "training.png"}
    text = (run_folder / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((.*?)\)", text)) == drawn


def test_the_same_inputs_give_the_same_files(two):
    write_report(two)
    before = {name: (two / name).read_bytes() for name in ("report.md", "report.html")}
    write_report(two, overwrite=True)
    assert {name: (two / name).read_bytes() for name in before} == before


def test_commands_given_win(two):
    text = write_report(two, commands=["make all"]).read_text(encoding="utf-8")
    assert "```bash\nmake all\n```" in text


@pytest.mark.parametrize("name", ["report.md", "report.html", "scores.png"])
def test_an_existing_report_is_kept(name, two):
    (two / name).write_text("mine")
    before = names(two)
    with pytest.raises(FileExistsError, match=rf"{re.escape(name)} exists.*--overwrite"):
        write_report(two)
    assert names(two) == before
    assert (two / name).read_text() == "mine"
    write_report(two, overwrite=True)
    assert (two / name).read_bytes() != b"mine"


def test_a_key_that_is_missing_is_named_and_nothing_is_written(two, make_evaluation):
    result = make_evaluation()
    del result["versions"]
    (two / "evaluation.json").write_text(json.dumps(result))
    before = names(two)
    with pytest.raises(ValueError, match=r"half: the results have no 'versions'\. To fix, write"):
        write_report(two)
    assert names(two) == before


def test_a_picture_that_cannot_be_drawn_leaves_the_folder_as_it_was(results):
    np.savez(results / "gates.npz", layer=np.array([0.5, 1.5]))
    before = names(results)
    with pytest.raises(ValueError, match=r"gates of layer are not in \[0, 1\]"):
        write_report(results)
    assert names(results) == before


def test_a_full_disk_leaves_no_half_of_a_page(two, monkeypatch):
    write_report(two)
    page = (two / "report.html").read_bytes()

    def fill_the_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("bge_pruning.utils.files.os.replace", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(two, overwrite=True)
    assert (two / "report.html").read_bytes() == page
    assert not [name for name in names(two) if name.startswith(".")]


def test_bge_m3_stays_below_three_megabytes(results, make_evaluation, make_entry):
    rng = np.random.default_rng(0)
    shapes = {"head": (24, 16), "intermediate": (24, 4096), "layer": (24,), "hidden": (1024,)}
    gates = {axis: rng.uniform(size=shape) for axis, shape in shapes.items()}
    np.savez(results / "gates.npz", **gates, **{f"{a}_kept": g > 0.4 for a, g in gates.items()})
    modes = ("dense", "sparse", "colbert", "dense+sparse", "all")
    scores = [make_entry(f"task-{task}", mode) for task in range(6) for mode in modes]
    (results / "evaluation.json").write_text(json.dumps(make_evaluation(scores)))
    losses = ("alignment", "similarity", "sparse", "colbert")
    rows = [
        {"batch": n, "metrics": {f"loss/train/{name}": rng.exponential() for name in losses}}
        for n in range(15_000)
    ]
    for axis in (*shapes, "encoder"):
        for key in ("expected_sparsity", "target_sparsity", "realised_sparsity"):
            for row in rows[::50]:
                row["metrics"][f"pruning/{key}/{axis}"] = rng.uniform()
        for row in rows[::50]:
            row["metrics"][f"pruning/lambda_1/{axis}"] = rng.normal()
            row["metrics"][f"pruning/lambda_2/{axis}"] = rng.normal()
    (results / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(results)
    assert 500_000 < (results / "report.html").stat().st_size < 3_000_000


def test_script(two, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([str(two)]) == 0
    assert capsys.readouterr().out == (f"wrote {two}/report.md and {two}/report.html\n")
    assert main([str(two)]) == 1
    assert "error: " in capsys.readouterr().err
    assert main([str(two), "--overwrite", "--command", "make all"]) == 0
