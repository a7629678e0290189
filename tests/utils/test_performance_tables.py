"""Tables of the documents from the benchmarks' JSON."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from bge_pruning.utils.performance_tables import (
    read_results,
    render_speed,
    render_steps,
    replace_section,
    write_tables,
)

ROOT = Path(__file__).parents[2]
SIDE = {"latency_ms": {"median": 12.34, "p95": 15.0}, "texts_per_s": 1234.5}
SETTING = {
    "runtime": "torch",
    "batch_size": 32,
    "length": 128,
    "rounds": 9,
    "model": SIDE,
    "baseline": SIDE,
    "speedup": {"median": 2.0, "quartiles": [1.9, 2.1]},
    "ideal": 2.1,
    "share": 0.95,
    "noisy": False,
}
CPU = {"machine": {"gpu": None}, "dtype": "fp32"}
SPEED = {
    "model": "results/small",
    **CPU,
    "settings": [
        SETTING,
        {**SETTING, "length": 16, "runtime": "onnx"},
        {**SETTING, "batch_size": 1},
        {**SETTING, "length": "real", "noisy": True},
    ],
}
COST = {
    "training": "gates",
    "batches": "fixed length",
    "median_seconds": 1.5,
    "tokens_per_second": 2000.0,
    "padding": 0.0,
    "utilisation": 0.8,
    "peak_bytes": 7e8,
}
STEPS = {
    "model": "configs/bge_m3/target_50pct.yaml",
    **CPU,
    "batch_size": 8,
    "shape": "24 layers",
    "ratios": {"fixed length": {"gates": [1.0, 1.05, 1.1]}},
    "throughput": {"length groups": 3.0},
    "costs": [COST],
}
DOCUMENT = """\
a
<!-- speed -->old<!-- end of speed -->
b
<!-- steps -->
<!-- end of steps -->
c
"""


def test_the_short_table_of_speed_has_batches_of_long_and_real_texts():
    brief, full = render_speed([SPEED], brief=True), render_speed([SPEED], brief=False)
    assert brief.startswith("results/small:\n\n| runtime |")
    assert "| torch | 32 x 128 | 12.3 (15.0) | 1,234.5 | 12.3 (15.0) |" in brief
    assert "2.00 (1.90 to 2.10) | 2.10 | 95% |" in brief
    for left_out in ("32 x 16", "1 x 128"):
        assert f"| {left_out} |" in full and f"| {left_out} |" not in brief
    assert "| 32 x real |" in brief and "noise, 9 turns" in brief


def test_steps_say_what_was_measured_and_leave_the_rest_empty():
    brief, full = render_steps([STEPS], brief=True), render_steps([STEPS], brief=False)
    row = (
        "| random weights, 24 layers, 8 texts | fixed length | 1.050 (1.000 to 1.100) |  |  |  |  |"
    )
    assert row in brief
    assert "| gates | 1.500 | 2,000 | 0.0% | 80.0% | 700 MB |" in full and "1.500" not in brief


def test_results_of_one_model_share_their_rows():
    cached = STEPS | {"ratios": {"fixed length": {"cached": [0.9, 1.0, 1.1]}}, "throughput": {}}
    found = render_steps([STEPS, cached], brief=True)
    assert "| 1.050 (1.000 to 1.100) |  |  | 1.000 (0.900 to 1.100) |" in found
    assert found.count("fixed length") == 1
    other = render_steps([STEPS, cached | {"batch_size": 16}], brief=True)
    assert other.count("fixed length") == 2


def test_a_gpu_is_named():
    gpu = {"machine": {"gpu": "NVIDIA H100"}, "dtype": "bf16"}
    random = {"model": "x/y.yaml (target, random weights)", "shapes": {"model": "18 layers"}}
    found = render_speed([SPEED | gpu | random], brief=True)
    assert found.startswith("random weights, 18 layers, on NVIDIA H100 in bf16:\n")
    assert "| random weights, 24 layers, 8 texts, on NVIDIA H100 in bf16 |" in render_steps(
        [STEPS | gpu], brief=True
    )


def test_a_section_is_replaced_and_the_rest_is_kept():
    found = replace_section(DOCUMENT, "speed", "new \\1")
    assert found.startswith("a\n<!-- speed -->\n\nnew \\1\n\n<!-- end of speed -->\nb\n")
    assert replace_section(found, "speed", "new \\1") == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- speed -->",
        "<!-- end of speed --><!-- speed -->",
        "<!-- speed --><!-- speed --><!-- end of speed -->",
    ],
)
def test_marks_that_are_not_there(text):
    with pytest.raises(ValueError, match=r"<!-- speed --> and .* once each.*To fix, put them"):
        replace_section(text, "speed", "new")


def test_results_are_read_by_kind(tmp_path):
    for name, result in (("b", SPEED), ("a", STEPS), ("c", SPEED)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert read_results(tmp_path) == {"speed": [SPEED, SPEED], "steps": [STEPS]}


def alone(result: dict) -> dict:
    """Measured without a baseline."""
    other = copy.deepcopy(result)
    del other["settings"][0]["speedup"]
    return other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is not JSON \(.*\)"),
        ("[]", "it is a list, expected an object with keys"),
        ("{}", "has no model, batch_size, machine, dtype, ratios, throughput, costs"),
        (json.dumps(alone(SPEED)), r"has no settings\[0\].speedup"),
        (
            json.dumps(SPEED).replace('"real"', "null"),
            r"settings\[3\].length is null, expected a whole number of 0 or more",
        ),
    ],
    ids=["cut", "list", "empty", "alone", "length"],
)
def test_files_that_are_no_results(content, message, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(
        ValueError, match=rf"x\.json: {message}\. To fix, measure again, with bench"
    ):
        read_results(tmp_path)


@pytest.mark.parametrize("content", [b"\xff", None])
def test_documents_that_cannot_be_read(content, tmp_path):
    path = tmp_path / "x.md"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"x\.md: cannot be read as Markdown \(.*\)\. To fix, name"
    ):
        write_tables(path, {"speed": [], "steps": []}, brief=True, write=True)


def test_a_folder_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no results\. To fix, run a benchmark"):
        read_results(tmp_path)


def test_tables_are_written_once(tmp_path):
    path, results = tmp_path / "page.md", {"speed": [SPEED], "steps": [STEPS]}
    path.write_text(DOCUMENT)
    assert write_tables(path, results, brief=True, write=False)
    assert path.read_text() == DOCUMENT
    assert write_tables(path, results, brief=True, write=True)
    assert "32 x 128" in path.read_text() and "1.050" in path.read_text()
    assert not write_tables(path, results, brief=True, write=True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("document", "brief"), [("README.md", True), ("experiments/results/performance.md", False)]
)
def test_the_documents_have_the_tables_of_what_was_measured(document, brief):
    results = read_results(ROOT / "experiments" / "results" / "performance")
    assert not write_tables(ROOT / document, results, brief, write=False)
