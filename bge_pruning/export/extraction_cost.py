"""Memory and time of one extraction, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bge_pruning.models.precision import DTYPES

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class ExtractionCost:
    """What an extraction took.

    Attributes:
        seconds: Time of the call, without starting Python and importing.
        before: Resident bytes of the process that has imported and used everything.
        peak: The most bytes on top of that, see :class:`PeakMemory`.
        peak_anonymous: The same without pages of mapped files.
    """

    seconds: float
    before: int
    peak: int
    peak_anonymous: int


def measure_extraction(
    checkpoint: Path, warm_up: Path, output: Path, dtype: str = "fp32"
) -> ExtractionCost:
    """Extract in a new process, which has extracted a small run before.

    Args:
        checkpoint: The run's checkpoint.
        warm_up: Checkpoint of a small run, so that imports are not counted.
        output: Folder to write.
        dtype: Precision of the weights on disk, a name of ``DTYPES``.

    Raises:
        RuntimeError: If the extraction fails; the message is the process's own.
    """
    with TemporaryDirectory() as folder:
        result = Path(folder) / "cost.json"
        names = [str(path.absolute()) for path in (checkpoint, warm_up, output, result)]
        process = subprocess.run(
            [sys.executable, "-m", __name__, *names, dtype],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if process.returncode:
            raise RuntimeError(f"the extraction failed: {process.stderr.strip()}")
        return ExtractionCost(**json.loads(result.read_text()))


def main(checkpoint: str, warm_up: str, output: str, result: str, dtype: str) -> None:
    """The process's work: extract the small run, then measure the other."""
    from bge_pruning.export.extract import ExtractOptions, extract
    from bge_pruning.utils.process_memory import watch_memory

    options = ExtractOptions(dtype=DTYPES[dtype])
    with TemporaryDirectory() as folder:
        extract(Path(warm_up), Path(folder) / "small", options=options)
    with watch_memory() as peak:
        started = time.perf_counter()
        extract(Path(checkpoint), Path(output), options=options)
        seconds = time.perf_counter() - started
    cost = ExtractionCost(seconds, peak.before, peak.total, peak.anonymous)
    Path(result).write_text(json.dumps(asdict(cost)))


if __name__ == "__main__":
    main(*sys.argv[1:])
