"""The record that tells a whole conversion from a half one."""

from __future__ import annotations

from pathlib import Path

import pytest

from bge_pruning.model_io.bert_conversion import (
    RECORD_FILE,
    compute_sha256,
    is_complete,
    write_record,
)


def fill(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / name).write_text(name)
    write_record(folder, {"source_sha256": name})


def test_is_complete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "none", "x")
    fill(tmp_path, "x")
    assert is_complete(tmp_path, "x")
    assert not is_complete(tmp_path, "y")
    (tmp_path / "sub" / "x").write_text("longer")
    assert not is_complete(tmp_path, "x")
    (tmp_path / "sub" / "x").unlink()
    assert not is_complete(tmp_path, "x")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": []}', '{"files": {}}', "\udc80"])
def test_a_foreign_record_is_not_complete(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD_FILE).write_text(content, errors="surrogateescape")
    assert not is_complete(tmp_path, "x")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert compute_sha256(tmp_path / "abc") == expected
