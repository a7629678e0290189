"""The files of a run and of its results, as a report reads them."""

import json
from pathlib import Path

import pytest

PARTS = ("encoder", "embeddings", "pooler", "heads", "total")
SHAPE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 32,
}


def entry(task: str = "stsb-en-test", mode: str = "dense", **changes: object) -> dict:
    """A main score as ``evaluation.json`` holds it."""
    found = {
        "task": task,
        "kind": "similarity",
        "mode": mode,
        "metric": "cosine_spearman" if mode == "dense" else "spearman",
        "main": True,
        "value": 0.81,
        "baseline": 0.82,
        "also": {"pruned, before recovery": 0.75},
        "floor": 0.51,
        "floors": {"random_weights": 0.43, "word_embeddings": 0.51},
        "retention": 0.81 / 0.82,
        "retention_above_floor": 0.30 / 0.31,
        "interval": [0.79, 0.83],
        "p_value": 0.02,
        "samples": 1379,
        "texts": 2552,
        "truncated": 0,
        "seconds": 2.0,
    }
    return found | changes


def counts(encoder: int) -> dict[str, int]:
    parts = {"encoder": encoder, "embeddings": 3_000_000, "pooler": 1_000, "heads": 0}
    return {**parts, "total": sum(parts.values())}


def evaluation(tasks: list[dict] | None = None) -> dict:
    """Content of ``evaluation.json``: one score and all costs."""
    latency = {name: {"median": 5.0, "p95": 7.0} for name in ("model", "baseline")}
    throughput = {"model": 180.0, "baseline": 100.0}
    memory = {
        "model": {"weights": 20_000_000, "activations": 5_000_000},
        "baseline": {"weights": 28_000_000, "activations": 12_000_000},
    }
    return {
        "model": "results/half",
        "baseline": "models/whole",
        "tasks": [entry()] if tasks is None else tasks,
        "parameters": {"model": counts(2_000_000), "baseline": counts(4_000_000)},
        "size_bytes": {"model": 20_000_000, "baseline": 28_000_000},
        "speed": {
            "device": "cpu",
            "threads": 2,
            "latency_ms": {**latency, "ratio": 0.5, "ratio_iqr": [0.4, 0.625]},
            "throughput_texts_per_s": {**throughput, "ratio": 1.8, "ratio_iqr": [1.7, 1.9]},
            "memory_bytes": {"texts": 32, "tokens": 128, **memory},
        },
        "seed": 0,
        "max_length": 512,
        "versions": {"python": "3.11.0", "torch": "2.7.0"},
        "command": "python scripts/evaluate_model.py results/half",
    }


def pruning(expected: float = 0.499) -> dict:
    """Content of ``pruning.json``."""
    constraint = {"target_sparsity": 0.5, "realised_sparsity": 0.5, "expected_sparsity": expected}
    return {
        "source": {"base_model": "models/whole", "revision": None},
        "source_shape": SHAPE,
        "shape": {**SHAPE, "num_hidden_layers": 2},
        "parameters": {"source": counts(4_000_000), "extracted": counts(2_000_000)},
        "constraint": {"layer": constraint},
        "kept": {"layer": [0, 3], "hidden": None, "head": None, "intermediate": None},
        "seed": 17,
        "versions": {"python": "3.11.0", "mosaicml": "0.32.1"},
    }


def history(steps: int = 40) -> list[dict]:
    """Rows of ``metrics.jsonl`` of a run with gates on two axes."""
    rows = [{"batch": 0, "metrics": {"loss/train/total": 1.0}}]
    for batch in range(1, steps):
        target = min(0.5, batch / steps)
        metrics = {"loss/train/total": 2.0, "loss/train/distillation_alignment": 1 / batch}
        for axis in ("head", "encoder"):
            metrics[f"pruning/expected_sparsity/{axis}"] = target - 0.01
            metrics[f"pruning/realised_sparsity/{axis}"] = 0.5
        metrics["pruning/target_sparsity/head"] = target
        metrics["pruning/lambda_1/head"] = 0.1 * batch
        metrics["pruning/lambda_2/head"] = 0.2 * batch
        rows.append({"batch": batch, "metrics": metrics})
    rows += [
        {"batch": batch, "metrics": {"eval/dev/cosine_spearman": 0.6 + batch / 100}}
        for batch in (10, 20, 30)
    ]
    return rows


def gates() -> dict:
    """Content of ``gates.npz``: L=4, A=2, F=32, H=16; layers 1 and 2 are removed."""
    import numpy as np

    generator = np.random.default_rng(0)
    shapes = {"layer": (4,), "head": (4, 2), "intermediate": (4, 32), "hidden": (16,)}
    arrays = {axis: generator.uniform(0.02, 0.98, shape) for axis, shape in shapes.items()}
    arrays["layer"] = np.array([0.9, 0.1, 0.2, 0.8])
    kept = {axis: a >= np.median(a, axis=-1, keepdims=True) for axis, a in arrays.items()}
    return arrays | {f"{axis}_kept": mask for axis, mask in kept.items()}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder with every file that a report reads."""
    import numpy as np

    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(evaluation()))
    (folder / "pruning.json").write_text(json.dumps(pruning()))
    write_rows(folder / "metrics.jsonl", history())
    recovery = [{"batch": n, "metrics": {"loss/train/total": 1 / (n + 1)}} for n in range(9)]
    write_rows(folder / "metrics-recovery.jsonl", recovery)
    np.savez(folder / "gates.npz", **gates())
    (folder / "config.yaml").write_text("run_name: half\nseed: 17\n")
    (folder / "commands.txt").write_text("python scripts/train.py a.yaml\npython b.py\n")
    return folder


@pytest.fixture
def run_folder(results: Path) -> Path:
    """A run folder: what is known after training, before anything is cut or evaluated."""
    folder = results.rename(results.parent / "my-run")
    for name in ("evaluation.json", "pruning.json", "metrics-recovery.jsonl"):
        (folder / name).unlink()
    (folder / "versions.json").write_text(json.dumps({"python": "3.11.0", "torch": "2.7.0"}))
    return folder


@pytest.fixture
def inputs(results: Path):
    """The same, read."""
    from bge_pruning.reports.report_data import read_inputs

    return read_inputs(results)


@pytest.fixture
def make_entry():
    """A function that makes a main score."""
    return entry


@pytest.fixture
def make_evaluation():
    """A function that makes the content of ``evaluation.json``."""
    return evaluation


@pytest.fixture
def make_record():
    """A function that makes an evaluation as a record."""
    from bge_pruning.utils.records import EvaluationRecord

    def make(tasks: list[dict] | None = None, **changes: object):
        return EvaluationRecord.model_validate({**evaluation(tasks), **changes})

    return make


@pytest.fixture
def make_pruning():
    """A function that makes the content of ``pruning.json``."""
    return pruning


@pytest.fixture
def make_history():
    """A function that makes the rows of ``metrics.jsonl``."""
    return history


@pytest.fixture
def said():
    """A function from a figure to all of its text."""
    import matplotlib.text

    def texts(figure) -> str:
        return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))

    return texts


@pytest.fixture
def assert_legible(monkeypatch):
    """A function that fails if words that a figure shows overlap or leave it."""
    from matplotlib.text import Text

    shown: list[Text] = []
    draw = Text.draw
    # Ticks beyond the ends of an axis are there, but are never drawn.
    monkeypatch.setattr(Text, "draw", lambda self, r: (shown.append(self), draw(self, r))[1])

    def check(figure) -> None:
        shown.clear()
        figure.draw_without_rendering()
        texts = [
            text for text in dict.fromkeys(shown) if text.get_text().strip() and text.get_visible()
        ]
        assert texts
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        whole = figure.bbox.padded(2)
        for index, (name, box) in enumerate(boxes):
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1, name
            assert whole.y0 <= box.y0 and box.y1 <= whole.y1, name
            for other, its_box in boxes[:index]:
                assert not box.padded(-1).overlaps(its_box.padded(-1)), (name, other)

    return check
