"""The record that tells a whole conversion from a half one.

Nothing here imports torch, so that a finished conversion is recognised in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

RECORD_FILE = "conversion.json"


def write_json(path: Path, content: object) -> None:
    """Write indented UTF-8 JSON with a final newline.

    Args:
        path: File to write.
        content: Anything that JSON can express.
    """
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compute_sha256(path: Path) -> str:
    """SHA-256 of a file.

    Args:
        path: File to read, in blocks of 1 MiB.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_record(folder: Path, record: Mapping[str, object]) -> None:
    """Write ``conversion.json`` as the last file of a folder.

    Args:
        folder: Folder with all other files in place; their sizes in bytes go under ``files``.
        record: Further entries.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_json(folder / RECORD_FILE, {**record, "files": sizes})


def is_complete(folder: Path, source_sha256: str) -> bool:
    """Whether a folder holds a whole conversion of given weights.

    Args:
        folder: Folder to look at; it need not exist.
        source_sha256: Checksum of the source weights.

    Returns:
        True if the record names that checksum and every recorded file is there with its size.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        sizes = {folder / name: size for name, size in record["files"].items()}
        return record["source_sha256"] == source_sha256 and all(
            path.is_file() and path.stat().st_size == size for path, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no record, or one that another program wrote
