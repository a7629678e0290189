"""Drawing takes longer than the training that it shows: most tests get an empty picture."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

# Of these, pictures are the subject.
DRAWN = re.compile(
    r"tests/(reports|utils)/test_\w*(plot|pictures|figures|gate_map|visual)\w*\.py"
    r"|three_megabytes|same_inputs|study_summary|comparison"
)
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="1.0pt" height="1.0pt"></svg>'
_all_drawn = False


@contextmanager
def drawn() -> Iterator[None]:
    """Pictures are drawn whatever the test."""
    global _all_drawn
    before, _all_drawn = _all_drawn, True
    try:
        yield
    finally:
        _all_drawn = before


@pytest.fixture(scope="session", autouse=True)
def quick_pictures() -> Iterator[None]:
    """Figures are made as ever, but laid out and rendered only where that is looked at."""
    from matplotlib.figure import Figure

    save = Figure.savefig

    def savefig(self: Figure, file: str | os.PathLike | IO, **options: Any) -> None:
        if _all_drawn or DRAWN.search(os.environ.get("PYTEST_CURRENT_TEST", "")):
            save(self, file, **options)
        elif hasattr(file, "write"):
            file.write(SVG)
        else:
            Path(file).write_bytes(PNG)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield
