"""Files of something else, and an object that runs something when a careless loader unpickles it."""

import os
from collections.abc import Callable
from pathlib import Path

# A weight file of 3 GB that was not fetched, an error page, and what a full disk leaves.
FOREIGN = {
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
    "html": b"<!DOCTYPE html><html>404</html>",
    "text": b"hello world",
    "empty": b"",
    "zeros": bytes(64),
}


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.folder),)
