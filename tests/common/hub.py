"""Data sets in folders laid out as on the hub; the real libraries read them offline."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_dataset(folder: Path, configs: dict[str, dict[str, list[dict]]]) -> Path:
    """Write rows by configuration and split."""
    folder.mkdir(exist_ok=True)
    entries = []
    for config, splits in configs.items():
        for split, rows in splits.items():
            (folder / f"{config}-{split}.jsonl").write_text(jsonl(rows))
        data = [{"split": split, "path": f"{config}-{split}.jsonl"} for split in splits]
        entries.append({"config_name": config, "data_files": data})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(entries)}\n---\n")
    return folder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a machine without a network, which is empty."""
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


@pytest.fixture
def serve(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that has mteb read the data of a task from a folder, which it returns."""
    import mteb

    def serve(task_name: str, configs: dict[str, dict[str, list[dict]]]) -> Path:
        folder = write_dataset(tmp_path / task_name, configs)
        monkeypatch.setitem(mteb.get_task(task_name).metadata.dataset, "path", str(folder))
        return folder

    return serve
