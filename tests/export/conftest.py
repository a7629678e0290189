"""Copies of the tiny model that a test may export into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def copy_model(model_folder, tmp_path) -> Callable[..., Path]:
    """A function that copies the tiny model without some of its heads, with a pooling."""

    def copy(*without: str, pooling: str = "cls") -> Path:
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        for head in without:
            (folder / f"{head}.pt").unlink()
        path = folder / "1_Pooling" / "config.json"
        modes = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens")}
        name = "pooling_mode_cls_token" if pooling == "cls" else "pooling_mode_mean_tokens"
        content = {**json.loads(path.read_text()), **modes, name: True}
        path.write_text(json.dumps(content))
        return folder

    return copy


@pytest.fixture
def folder(copy_model) -> Path:
    return copy_model()
