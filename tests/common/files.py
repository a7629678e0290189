"""Files as tests compare, change and damage them."""

import json
from pathlib import Path
from typing import Any

# A weight file of 3 GB that was not fetched, an error page, and what a full disk leaves.
FOREIGN = {
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
    "html": b"<!DOCTYPE html><html>404</html>",
    "text": b"hello world",
    "empty": b"",
    "zeros": bytes(64),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path in it."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))
