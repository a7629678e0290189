"""Copies of the tiny model that a test may export into."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def copy_without(model_folder, tmp_path) -> Callable[..., Path]:
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
def folder(copy_without) -> Path:
    return copy_without()


@pytest.fixture
def refuses(tmp_path) -> Callable[..., None]:
    """A function: an extraction fails with this error, and changes nothing in the test's folder."""
    from bge_pruning.export.extract import ExtractOptions, extract

    def contents() -> dict[str, bytes | None]:
        paths = tmp_path.rglob("*")
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}

    def refuses(
        error: type[BaseException] | tuple[type[BaseException], ...],
        message: str | None,
        run: Path,
        output: Path | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        before = contents()
        with pytest.raises(error, match=message):
            extract(run, output or tmp_path / "small", overwrite, options=ExtractOptions(**options))
        assert contents() == before

    return refuses
