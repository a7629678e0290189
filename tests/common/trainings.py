"""Trainings of the tiny model, and what they leave behind."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import pytest

from tests.common.pictures import drawn

YAML = """\
run_name: tiny
seed: 3
max_duration: 4ba
eval_interval: 2ba
save_interval: 2ba
log_interval: 1ba
global_train_batch_size: 8
eval_batch_size: 8
device: cpu
progress_bar: false
run_folder: {folder}/runs/${{run_name}}
results_folder: {folder}/results/${{run_name}}
model:
  base_model: {model}
  max_length: 16
  l0_module:
    target_model: {{d_model: 24, n_heads: 3, n_layers: 3, intermediate_size: 48}}
    lagrangian_warmup_steps: 0.5dur
data:
  processed_folder: {folder}/processed
  train:
    - {{name: train, kind: sts, path: {csv}}}
  eval:
    - {{name: dev, kind: sts, path: {csv}}}
  on_trained_eval: warn
loss: {{sts_regression: 1.0, distillation_alignment: 1.0, distillation_similarity: 1.0}}
optimizer: {{lr: 1.0e-3}}
scheduler: {{t_warmup: 1ba}}
loggers: {{folder: {folder}/logs}}
"""
TARGET = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def extract_json(*arguments: Any, **options: Any) -> dict[str, Any]:
    """Extract a run, and return what ``pruning.json`` says, which is what is returned."""
    from bge_pruning.export.extract import extract

    record = extract(*arguments, **options)
    content = read_json(Path(arguments[1]) / "pruning.json")
    assert content == record.as_dict()
    return content


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged(run: Path, key: str) -> dict[int, float]:
    """The values of a metric by the batch that they were logged at."""
    return {row["batch"]: row["metrics"][key] for row in read_metrics(run) if key in row["metrics"]}


def losses(run: Path, name: str = "total") -> list[float]:
    """A part of the training loss, line by line: a step that is logged twice is there twice."""
    rows, key = read_metrics(run), f"loss/train/{name}"
    return [row["metrics"][key] for row in rows if key in row["metrics"]]


@pytest.fixture(scope="session")
def make_yaml(model_folder: Path, sts_csv: Path) -> Callable[[Path], Path]:
    """A function that writes ``tiny.yaml`` into a folder, which it trains in."""

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "tiny.yaml"
        text = YAML.format(folder=folder, model=model_folder, csv=sts_csv)
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def tiny_yaml(make_yaml: Callable[[Path], Path], tmp_path: Path) -> Path:
    """Four steps of pruning on the tiny model, in this test's folder."""
    return make_yaml(tmp_path)


@pytest.fixture
def configure(tiny_yaml: Path) -> Callable[..., Any]:
    """A function that makes this configuration with overrides."""
    from bge_pruning.config.load import load_config

    return lambda *overrides: load_config([tiny_yaml], overrides)


@pytest.fixture(scope="session")
def train_tiny(make_yaml: Callable[[Path], Path]) -> Callable[..., Path]:
    """A function ``(folder, *overrides)`` that trains in a folder and returns the run folder.

    The report takes longer than the training: ``report=True`` writes it.
    """
    from bge_pruning.config.load import load_config
    from bge_pruning.train import train
    from bge_pruning.training import run_report

    def run(folder: Path, *overrides: str, report: bool = False) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            if not report:
                patch.setattr(run_report, "write_report", lambda *_, **__: None)
            return train(load_config([make_yaml(folder)], overrides))

    return run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, train_tiny: Callable[..., Path]) -> Path:
    """A run of four steps with gates on all axes, and its report; copy it to write into it."""
    with drawn():
        return train_tiny(tmp_path_factory.mktemp("trained"), report=True)


@pytest.fixture(scope="session")
def extracted_folder(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Path:
    """The model that this run extracts to; copy it to write into it."""
    from bge_pruning.export.extract import extract

    folder = tmp_path_factory.mktemp("extracted") / "model"
    extract(trained_run, folder)
    return folder


# The learning rate is 0 in the first two steps: Composer's schedules start late.
PIPELINE = ["recovery.max_duration=3ba", "seed=5"]


class Pipeline(NamedTuple):
    """A pipeline that was run to its end: its files, and what it returned."""

    folder: Path
    yaml: Path
    results: Path
    evaluation: Any


@pytest.fixture(scope="session")
def finished_pipeline(
    tmp_path_factory: pytest.TempPathFactory, make_yaml: Callable[[Path], Path], sts_csv: Path
) -> Pipeline:
    """Four steps of pruning and three of recovery; copy its folder to write into it."""
    from bge_pruning.workflows.pipeline import run_pipeline
    from bge_pruning.workflows.stages import EvaluationPlan

    folder = tmp_path_factory.mktemp("pipeline")
    yaml = make_yaml(folder)
    with drawn():
        evaluation = run_pipeline([str(yaml)], PIPELINE, EvaluationPlan([str(sts_csv)]))
    return Pipeline(folder, yaml, folder / "results" / "tiny", evaluation)


@pytest.fixture(scope="session")
def load_state() -> Callable[[Path], dict]:
    """A function that reads the newest checkpoint of a run, or a checkpoint file."""
    import torch

    from bge_pruning.model_io.checkpoint import PLAIN_TYPES, find_checkpoint

    def load(path: Path) -> dict:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            return torch.load(find_checkpoint(path), weights_only=True)["state"]

    return load


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """A function that compares nested tensors, exactly or within a tolerance."""
    import numpy as np
    import torch

    def same(a: object, b: object, atol: float = 0.0, where: str = "") -> None:
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                same(a[key], b[key], atol, f"{where}.{key}")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), where
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                same(x, y, atol, f"{where}[{index}]")
        elif isinstance(a, torch.Tensor | np.ndarray):
            a, b = torch.as_tensor(a), torch.as_tensor(b)
            assert torch.allclose(a, b, rtol=0.0, atol=atol), (
                f"{where} differs by {(a - b).abs().max()}"
            )
        else:
            assert a == b, f"{where}: {a!r} != {b!r}"

    return same


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list]:
    """A function that does some work as several ranks, each a thread, and returns what each got."""

    from bge_pruning.evaluation.text_encoder import Ranks

    def run(count: int, work: Callable[[Any], object]) -> list:
        barrier, slots = Barrier(count, timeout=60), [None] * count

        def of_rank(rank: int) -> object:
            def gather(part: object) -> list:
                slots[rank] = part
                barrier.wait()
                parts = list(slots)
                barrier.wait()
                return parts

            return work(Ranks(rank, count, gather))

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(of_rank, range(count)))

    return run
