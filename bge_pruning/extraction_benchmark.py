"""What extraction costs beside the mere reading and writing of the files, at any size."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bge_pruning.config import Config, ConfigError
from bge_pruning.export.extraction_cost import ExtractionCost, measure_extraction
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.validation import VALIDATION_SENTENCES
from bge_pruning.plan import Plan, build_plan
from bge_pruning.utils.random_run import write_random_run

MEMORY_LIMIT = 1.5  # of the checkpoint's bytes
TIME_LIMIT = 3.0  # of the time of reading and writing
BLOCK = 1 << 24  # bytes


@dataclass(frozen=True)
class Copying:
    """Seconds of plain input and output.

    Attributes:
        read: Reading the checkpoint, which is not in memory.
        write: Writing as many bytes, until they are on the disk.
    """

    read: float
    write: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.read + self.write


@dataclass(frozen=True)
class ExtractionBenchmark:
    """Measurements of every round.

    Attributes:
        shapes: The model and what it is cut to, in words.
        dtype: Precision of the extracted weights.
        optimizer: Whether the checkpoint holds an optimizer's state too.
        checkpoint: Bytes of the checkpoint.
        written: Bytes of the extracted folder.
        extractions: Cost of each extraction.
        copies: Cost of plain input and output, measured in turns with them.
    """

    shapes: tuple[str, str]
    dtype: str
    optimizer: bool
    checkpoint: int
    written: int
    extractions: list[ExtractionCost]
    copies: list[Copying]

    @property
    def memory_ratio(self) -> float:
        """Largest peak of all rounds, as a share of the checkpoint's bytes."""
        return max(cost.peak for cost in self.extractions) / self.checkpoint

    @property
    def time_ratio(self) -> float:
        """Median extraction as a multiple of the median of reading and writing."""
        seconds = median(cost.seconds for cost in self.extractions)
        return seconds / median(copy.seconds for copy in self.copies)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "memory_ratio": self.memory_ratio,
            "time_ratio": self.time_ratio,
            "limits": {"memory": MEMORY_LIMIT, "time": TIME_LIMIT},
        }


def measure(
    config: Config,
    folder: Path | None = None,
    dtype: str = "fp32",
    with_optimizer: bool = False,
    rounds: int = 3,
    report: Callable[[str], None] = lambda _: None,
) -> ExtractionBenchmark:
    """Make a run of random weights, and extract it again and again.

    The checkpoint is on the disk but not in memory when it is read.

    Args:
        config: The run, for its shapes; nothing is read but its YAML.
        folder: Where to work; a temporary folder of the system if ``None``. Nothing stays there.
        dtype: Precision of the extracted weights, a name of ``DTYPES``.
        with_optimizer: The checkpoint holds the optimizer's state too.
        rounds: How often; plain copying is measured before each.
        report: Called with a line about each step.

    Raises:
        ConfigError: If the run has no target shape.
        RuntimeError: If an extraction fails.
    """
    plan = build_plan(config)
    if plan.target is None:
        raise ConfigError(
            f"{config.run_name} has no target shape to extract. To fix, choose a configuration "
            f"with model.l0_module.target_model."
        )
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder. To fix, make it, or leave --folder out.")
    with TemporaryDirectory(dir=folder, prefix="extraction-benchmark-") as name:
        place = Path(name)
        report(f"writing a run of random weights into {place}")
        checkpoint = _write_run(place / "run", plan, with_optimizer)
        warm_up = _write_run(place / "warm-up", _tiny(plan), with_optimizer=False)
        extractions, copies, written = [], [], 0
        for index in range(rounds):
            copies.append(measure_copying(checkpoint, place / "copy"))
            _forget(checkpoint)
            cost = measure_extraction(checkpoint, warm_up, place / "small", dtype)
            extractions.append(cost)
            written = sum(p.stat().st_size for p in (place / "small").rglob("*") if p.is_file())
            shutil.rmtree(place / "small")
            report(f"round {index + 1}: {cost.seconds:.2f} s, peak {cost.peak / 1e9:.3f} GB")
        return ExtractionBenchmark(
            (plan.source.describe(), plan.target.describe()),
            dtype,
            with_optimizer,
            checkpoint.stat().st_size,
            written,
            extractions,
            copies,
        )


def _write_run(folder: Path, plan: Plan, with_optimizer: bool) -> Path:
    arguments = {
        "axes": list(plan.axes),
        "target": asdict(plan.target),
        "target_parameters": None,
        "start_sparsity": 0.0,
        "seed": 0,
    }
    words = [word for sentence in VALIDATION_SENTENCES for word in sentence.split()]
    return write_random_run(folder, plan.source, arguments, words, with_optimizer)


def _tiny(plan: Plan) -> Plan:
    """A run that needs the same code, but nearly no time."""
    small = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    source = EncoderShape(
        **small,
        intermediate_size=32,
        vocab_size=300,
        max_position_embeddings=300,
        pooler=plan.source.pooler,
        sparse_head=plan.source.sparse_head,
        colbert_dim=16 if plan.source.colbert_dim else 0,
    )
    return Plan(source, ("intermediate",), replace(source, intermediate_size=16), None)


def measure_copying(source: Path, target: Path) -> Copying:
    """Read a file that is not in memory, then write as many bytes to the disk, and remove them."""
    _forget(source)
    block, size = bytearray(BLOCK), source.stat().st_size
    started = time.perf_counter()
    with source.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass
    read = time.perf_counter() - started
    started = time.perf_counter()
    with target.open("wb", buffering=0) as file, memoryview(block) as view:
        for start in range(0, size, BLOCK):
            file.write(view[: min(BLOCK, size - start)])
        os.fsync(file.fileno())
    write = time.perf_counter() - started
    target.unlink()
    return Copying(read, write)


def _forget(path: Path) -> None:
    """Take a file out of the memory that the system keeps of files, and end its earlier work."""
    os.sync()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def render(found: ExtractionBenchmark) -> str:
    """The measurements and both limits, for a person."""
    gb = 1e9
    costs, copies = found.extractions, found.copies
    seconds = [cost.seconds for cost in costs]
    plain = [copy.seconds for copy in copies]
    lines = [
        ("model", " -> ".join(found.shapes)),
        ("checkpoint", f"{found.checkpoint / gb:.3f} GB"),
        ("written", f"{found.written / gb:.3f} GB ({found.dtype})"),
        ("Python and imports", f"{median(c.before for c in costs) / gb:.3f} GB"),
        ("peak above that", f"{max(c.peak for c in costs) / gb:.3f} GB"),
        ("  without mapped files", f"{max(c.peak_anonymous for c in costs) / gb:.3f} GB"),
        ("extraction", _spread(seconds)),
        ("reading the checkpoint", _spread([copy.read for copy in copies])),
        ("writing as many bytes", _spread([copy.write for copy in copies])),
        ("reading and writing", _spread(plain)),
        ("memory / checkpoint", f"{found.memory_ratio:.2f} (limit {MEMORY_LIMIT})"),
        ("time / plain time", f"{found.time_ratio:.2f} (limit {TIME_LIMIT})"),
    ]
    return "\n".join(f"{name:<24} {value}" for name, value in lines)


def _spread(seconds: list[float]) -> str:
    low, high = min(seconds), max(seconds)
    return f"{median(seconds):.2f} s ({low:.2f} to {high:.2f}, {len(seconds)} rounds)"
