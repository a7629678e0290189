"""Record what a run was made from: versions, revision of the code, seed and data."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from bge_pruning.config.schema import Config
from bge_pruning.model_io.run_checkpoints import list_checkpoints
from bge_pruning.training.sources import fingerprint_sources
from bge_pruning.utils.files import write_json
from bge_pruning.utils.json_records import read_record
from bge_pruning.utils.records import Code, RunRecord, Start

log = logging.getLogger(__name__)

RUN = "run.json"
ROOT = Path(__file__).parents[2]
# A resumed run may differ in these keys.
INCIDENTAL = ("time", "command")


def record_start(config: Config, versions: Mapping[str, str], ranks: int) -> None:
    """Add this start to ``run.json`` in the run folder, and log it; on one rank only.

    A run that resumes under other circumstances causes a warning, not an error.
    """
    folder = Path(config.run_folder)
    record = build_record(config, versions, ranks)
    starts = read_starts(folder / RUN)
    write_json(RunRecord(starts=[*starts, record]).as_dict(), folder / RUN, overwrite=True)
    log.info("%s", describe(record, config))
    if starts and list_checkpoints(folder):
        warn_of_changes(starts[-1], record)


def build_record(config: Config, versions: Mapping[str, str], ranks: int) -> Start:
    """Collect what the result depends on, besides the configuration.

    ``data`` holds for each source of ``train`` and ``eval`` what
    :func:`bge_pruning.training.sources.fingerprint_source` finds.
    """
    return Start(
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=sys.argv,
        seed=config.seed,
        ranks=ranks,
        versions=dict(versions),
        code=find_revision(ROOT),
        data=fingerprint_sources(config),
    )


def find_revision(folder: Path) -> Code | None:
    """Find the revision of the code in a git checkout, and whether it has uncommitted changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL, timeout=20
        ).strip()

    try:
        # An environment may lie inside another project's checkout, which lacks our files.
        git("ls-files", "--error-unmatch", "bge_pruning/__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "bge_pruning")
        return Code(revision=git("rev-parse", "HEAD"), changed=bool(changed))
    except (OSError, subprocess.SubprocessError):
        return None


def read_starts(path: Path) -> list[Start]:
    """Read the earlier starts of a run; none if they cannot be read."""
    try:
        return read_record(path, RunRecord, "remove the file").starts
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        log.warning("%s cannot be read (%s) and is begun anew.", path, error)
        return []


def describe(record: Start, config: Config) -> str:
    """Describe a start in one line."""
    code = record.code
    revision = "unknown revision"
    if code is not None:
        changed = " with uncommitted changes" if code.changed else ""
        revision = f"revision {code.revision[:12]}{changed}"
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return (
        f"run {config.run_folder} ({config.stage}): seed {record.seed}, ranks {record.ranks}, "
        f"code {revision}; {versions}"
    )


def warn_of_changes(before: Start, now: Start) -> None:
    """Warn of circumstances in which a resumed run differs from its start."""
    first, second = _flatten(before.as_dict()), _flatten(now.as_dict())
    changes = [
        f"{key} was {_shorten(first.get(key))} and is {_shorten(second.get(key))}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]
    if changes:
        log.warning(
            "the run resumes under other circumstances than it had before: %s. It may not end as "
            "an uninterrupted run would. To fix, put them back, or start again (overwrite=true).",
            "; ".join(changes),
        )


def _flatten(record: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in record.items():
        if not prefix and key in INCIDENTAL:
            continue
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key} ")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _shorten(value: str | None) -> str:
    """A value as a message shows it, of a checksum the beginning."""
    if value is None:
        return "not there"
    return value[:12] if re.fullmatch("[0-9a-f]{64}", value) else value
