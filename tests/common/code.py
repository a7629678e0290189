"""An object that runs something when a careless loader unpickles it."""

import os
from collections.abc import Callable
from pathlib import Path


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.folder),)
