#!/usr/bin/env python
"""Write requirements.txt: the pins of requirements.in with the SHA-256 of every file on the index.

    pip install uv
    python scripts/hash_requirements.py

With it pip installs nothing but what was published when it was written, and nothing that is not
listed. Needs the package index.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import run_command
from bge_pruning.utils.evaluation import write_text

# What the lock is for; uv reads it from the folder that it works in.
PROJECT = """\
[project]
name = "lock"
version = "0"
requires-python = ">=3.10,<3.13"

[tool.uv]
environments = ["sys_platform == 'linux' and python_version < '3.13'"]
"""
HEADER = """\
# Written by scripts/hash_requirements.py from {name}; change that one, and run the script again.
# Every package, direct and transitive, for Python 3.10 to 3.12 on Linux, with the SHA-256 of all
# its files. pip checks them, and installs nothing that is not listed.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--input", type=Path, default=Path("requirements.in"), metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("requirements.txt"), metavar="FILE")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args.input, args.output))


def run(source: Path, output: Path) -> None:
    """Resolve and write.

    Raises:
        FileNotFoundError: If the pins are not there, or uv is not installed.
        ValueError: If the pins contradict each other, or the index does not have one.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file. To fix, check the path.")
    write_text(output, HEADER.format(name=source.name) + compile_lock(source))
    print(f"wrote {output}")


def compile_lock(source: Path) -> str:
    """The pins with all that they pull in, and hashes."""
    near = Path(sys.executable).with_name("uv")  # of this environment, activated or not
    uv = str(near) if near.is_file() else shutil.which("uv")
    if uv is None:
        raise FileNotFoundError("uv is not installed. To fix, pip install uv.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        shutil.copy(source, folder / "requirements.in")
        words = "pip compile --quiet --universal --python-version 3.10 --generate-hashes"
        done = subprocess.run(
            [uv, *words.split(), "--no-header", "--no-annotate", "requirements.in"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise ValueError(
            f"{source}: cannot be resolved ({done.stderr.strip()}). To fix, correct the pins."
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
