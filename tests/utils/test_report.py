import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from bge_pruning.utils.report import write_report

SCRIPT = Path(__file__).parents[2] / "scripts" / "write_report.py"

SHAPE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 32,
}


def counts(encoder):
    parts = {"encoder": encoder, "embeddings": 3_000_000, "pooler": 1_000, "heads": 0}
    return {**parts, "total": sum(parts.values())}


def evaluation():
    task = {
        "task": "stsb-en-test",
        "mode": "dense",
        "metric": "cosine_spearman",
        "value": 0.81,
        "baseline": 0.82,
        "floor": 0.51,
        "floors": {"random_weights": 0.43, "word_embeddings": 0.51},
        "retention": 0.81 / 0.82,
        "retention_above_floor": 0.30 / 0.31,
        "pairs": 1379,
        "seconds": 2.0,
        "also": {"before recovery": 0.75},
    }
    latency = {name: {"median": 5.0, "p95": 7.0} for name in ("model", "baseline")}
    return {
        "model": "results/half",
        "baseline": "models/whole",
        "tasks": [task],
        "parameters": {"model": counts(2_000_000), "baseline": counts(4_000_000)},
        "speed": {
            "device": "cpu",
            "threads": 2,
            "latency_ms": {**latency, "ratio": 0.55, "ratio_iqr": [0.5, 0.6]},
            "throughput_texts_per_s": {
                "model": 180.0,
                "baseline": 100.0,
                "ratio": 1.8,
                "ratio_iqr": [1.7, 1.9],
            },
        },
        "versions": {"python": "3.11.0", "torch": "2.7.0"},
        "command": "python scripts/evaluate_model.py results/half",
    }


def pruning(expected=0.499):
    return {
        "source": {"base_model": "models/whole", "shape": SHAPE},
        "source_shape": SHAPE,
        "shape": {**SHAPE, "num_hidden_layers": 2},
        "parameters": {"source": counts(4_000_000), "extracted": counts(2_000_000)},
        "constraint": {
            "layer": {
                "expected_sparsity": expected,
                "target_sparsity": 0.5,
                "realised_sparsity": 0.5,
            }
        },
        "kept": {"layer": [0, 3], "hidden": None, "head": None, "intermediate": None},
        "seed": 17,
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    (tmp_path / "pruning.json").write_text(json.dumps(pruning()))
    rows = [{"batch": n, "metrics": {"pruning/expected_sparsity/layer": n / 9}} for n in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    kept = np.array([True, False, False, True])
    np.savez(tmp_path / "gates.npz", layer=np.array([0.9, 0.1, 0.2, 0.8]), layer_kept=kept)
    (tmp_path / "commands.txt").write_text("python scripts/train.py a.yaml\npython b.py\n")
    return tmp_path


def test_report_holds_every_section(folder):
    path = write_report(folder)
    text = path.read_text()
    assert path == folder / "report.md"
    assert text.startswith("# Pruned whole\n")
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "Parameters",
        "Quality",
        "Speed",
        "How the constraint was met",
        "How to reproduce",
    ]
    for picture in ("summary.png", "gates.png", "sparsity.png"):
        assert f"]({picture})" in text
        assert (folder / picture).stat().st_size > 1000
    assert "Left out" not in text


def test_report_says_the_numbers(folder):
    text = write_report(folder).read_text()
    assert "5.0 million parameters, 71.4% of the original's 7.0 million" in text
    assert "of the encoder it keeps 50.0%" in text
    assert "scores 0.8100 against 0.8200: 98.8% is kept, and 96.8% of what lies above" in text
    assert "| encoder | 4,000,000 | 2,000,000 | 50.0% |" in text
    assert "| heads | 0 | 0 | - |" in text
    assert "| `num_hidden_layers` | 4 | 2 |" in text
    row = "| stsb-en-test | 1,379 | 0.8200 | 0.7500 | 0.8100 | 0.4300 | 0.5100 | 98.8% | 96.8% |"
    assert row in text
    assert "| layers | 49.90% | 50.00% | 50.00% | 0.10 points |" in text
    assert "100 texts/s | 180 texts/s | 1.80 (1.70 to 1.90) |" in text
    assert "Layers that stay, counted from 0: 0, 3." in text
    assert "```bash\npython scripts/train.py a.yaml\npython b.py\n```" in text
    assert "Seed of the run: 17." in text
    assert "torch 2.7.0" in text


@pytest.mark.parametrize(("expected", "loud"), [(0.4901, False), (0.48, True), (0.52, True)])
def test_gates_far_from_the_target_are_said_loudly(folder, expected, loud):
    (folder / "pruning.json").write_text(json.dumps(pruning(expected)))
    text = write_report(folder).read_text()
    assert ("WARNING: the gates never reached the target" in text) == loud
    assert ("2.00 points of sparsity (layers)" in text) == loud


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("evaluation.json", "## Quality"),
        ("pruning.json", "## How the constraint"),
        ("metrics.jsonl", "sparsity.png"),
        ("gates.npz", "gates.png"),
        ("commands.txt", "python b.py"),
    ],
)
def test_a_missing_file_costs_its_section_and_is_named(folder, missing, gone):
    (folder / missing).unlink()
    text = write_report(folder).read_text()
    assert gone not in text
    assert f"Left out, because the folder does not hold them: {missing}." in text


def test_commands_given_win_and_the_evaluations_is_the_last_resort(folder):
    text = write_report(folder, commands=["make all"]).read_text()
    assert "```bash\nmake all\n```" in text
    (folder / "commands.txt").unlink()
    text = write_report(folder, overwrite=True).read_text()
    assert "```bash\npython scripts/evaluate_model.py results/half\n```" in text


def test_speed_that_was_not_measured(folder):
    (folder / "evaluation.json").write_text(json.dumps({**evaluation(), "speed": None}))
    assert "## Speed\n\nNot measured." in write_report(folder).read_text()


def test_baseline_that_was_not_given(folder):
    result = evaluation()
    result.update(baseline=None, speed=None)
    result["parameters"]["baseline"] = None
    task = result["tasks"][0]
    task.update(baseline=None, retention=None, retention_above_floor=None)
    (folder / "evaluation.json").write_text(json.dumps(result))
    (folder / "pruning.json").unlink()
    text = write_report(folder).read_text()
    assert text.startswith("# Evaluation of half\n")
    assert "it scores 0.8100 (floor 0.5100)" in text
    assert "| part | pruned |" in text


def test_existing_report_is_kept(folder):
    (folder / "report.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"report\.md exists.*--overwrite"):
        write_report(folder)
    assert (folder / "report.md").read_text() == "mine"
    assert not (folder / "summary.png").exists()
    assert write_report(folder, overwrite=True).read_text() != "mine"


def test_inputs_that_cannot_be_read(folder):
    (folder / "metrics.jsonl").write_text('{"batch": 1, "metrics": {}}\n{"batch"')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is no JSON"):
        write_report(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "pruning.json").write_text('{"source": {"base_model": "a"}}')
    with pytest.raises(ValueError, match="the results have no 'parameters'"):
        write_report(folder)
    (folder / "pruning.json").unlink()
    (folder / "evaluation.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither evaluation\.json nor pruning\.json"):
        write_report(folder)


def test_script(folder, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([str(folder)]) == 0
    assert "report.md" in capsys.readouterr().out
    assert main([str(folder)]) == 1
    assert "error: " in capsys.readouterr().err
    assert main([str(folder), "--overwrite", "--command", "make all"]) == 0


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not an archive"])
def test_gates_that_cannot_be_read(folder, content):
    (folder / "gates.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"gates\.npz .*To fix"):
        write_report(folder)


def test_gates_that_hold_code_are_not_run(folder):
    np.savez(folder / "gates.npz", layer=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"gates\.npz .*To fix"):
        write_report(folder)


@pytest.mark.parametrize("name", ["evaluation.json", "pruning.json", "metrics.jsonl"])
def test_files_in_another_encoding_are_named(folder, name):
    (folder / name).write_bytes('{"café": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}.* To fix"):
        write_report(folder)


@pytest.mark.parametrize("name", ["evaluation.json", "pruning.json"])
def test_json_of_another_kind_is_named(folder, name):
    (folder / name).write_text("[1, 2]")
    with pytest.raises(ValueError, match=rf"{name}.* To fix"):
        write_report(folder)


def test_a_report_that_fails_leaves_the_folder_as_it_was(folder):
    result = evaluation()
    del result["versions"]
    (folder / "evaluation.json").write_text(json.dumps(result))
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=r"the results have no 'versions'\. To fix, write them"):
        write_report(folder)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "commands", ["python a.py\n\n  \npython b.py", "\r\npython a.py\r\npython b.py\r\n"]
)
def test_empty_lines_are_no_commands(folder, commands):
    (folder / "commands.txt").write_text(commands)
    assert "```bash\npython a.py\npython b.py\n```" in write_report(folder).read_text()


def test_unicode_survives(folder):
    result = pruning()
    result["source"]["base_model"] = "models/модель-天气"
    (folder / "pruning.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    assert write_report(folder).read_text(encoding="utf-8").startswith("# Pruned модель-天气\n")


def test_gates_that_are_not_a_number_are_said_loudly(folder):
    (folder / "pruning.json").write_text(json.dumps(pruning(float("nan"))))
    text = write_report(folder).read_text()
    assert "WARNING: the gates never reached the target: they were nan points" in text


def test_the_worst_axis_is_the_one_that_counts(folder):
    result = pruning()
    row = {"target_sparsity": 0.25, "realised_sparsity": 0.25}
    result["constraint"]["hidden"] = {**row, "expected_sparsity": 0.2}
    result["constraint"]["budget"] = {**row, "expected_sparsity": 0.27}
    (folder / "pruning.json").write_text(json.dumps(result))
    text = write_report(folder).read_text()
    assert "they were 5.00 points of sparsity (hidden dimensions) away" in text
    assert "| budget | 27.00% | 25.00% | 25.00% | 2.00 points |" in text


def test_the_distance_is_said_when_it_is_small(folder):
    text = write_report(folder).read_text()
    assert (
        "The largest distance between gates and target is 0.10 points of sparsity (layers)." in text
    )


def test_a_run_without_gates(folder):
    (folder / "pruning.json").write_text(json.dumps({**pruning(), "constraint": {}}))
    assert "No axis was pruned by gates." in write_report(folder).read_text()


def test_layers_are_listed_only_where_some_are_gone(folder):
    result = pruning()
    result["kept"]["layer"] = [0, 1, 2, 3]
    (folder / "pruning.json").write_text(json.dumps(result))
    assert "Layers that stay" not in write_report(folder).read_text()


def test_a_sequence_of_tasks(folder):
    result = evaluation()
    other = {**result["tasks"][0], "task": "de", "value": 0.4, "retention_above_floor": None}
    result["tasks"].append({**other, "retention": 0.5, "also": {"before recovery": 0.2}})
    (folder / "evaluation.json").write_text(json.dumps(result))
    text = write_report(folder).read_text()
    assert "On de it scores 0.4000 against 0.8200: 50.0% is kept. It encodes 1.80" in text
    row = "| de | 1,379 | 0.8200 | 0.2000 | 0.4000 | 0.4300 | 0.5100 | 50.0% | - |"
    assert row in text


def test_a_bar_in_a_name_does_not_break_the_table(folder):
    result = evaluation()
    result["tasks"][0]["task"] = "a|b"
    (folder / "evaluation.json").write_text(json.dumps(result))
    lines = write_report(folder).read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| a")]
    header = lines[lines.index(row) - 2]
    assert row.replace("\\|", "").count("|") == header.count("|")
