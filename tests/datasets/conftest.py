"""Files of rows, and the tokenizer of the tiny model."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer_json(model_folder) -> bytes:
    return (model_folder / "tokenizer.json").read_bytes()


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """A function that writes rows (as JSON lines), text or bytes, and returns the path."""

    def write(content: list | str | bytes, name: str) -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        data = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write
