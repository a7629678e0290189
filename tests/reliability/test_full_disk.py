"""A disk that fills up while a file is written: one clear error, and nothing that looks whole.

A limit on the size of files stands in for a full disk: it needs no rights, and the same calls fail.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).parents[2]
# In a child: a process that died of a full disk cannot spoil the others.
PROGRAM = """
import resource, signal, sys
from bge_pruning.utils.guard import run_command
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the call fails, with EFBIG
{imports}
def command():
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    {command}
sys.exit(run_command(command))
"""


def run_full(place: Path, limit: int, imports: str, command: str) -> subprocess.CompletedProcess:
    text = PROGRAM.format(limit=limit, imports=imports, command=command)
    words = [sys.executable, "-c", text]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def assert_one_error(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.rstrip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    assert "To fix, " in lines[-1]


@pytest.mark.parametrize("limit", [100, 20_000, 60_000])
def test_an_export(limit, train_tiny, tmp_path, summary):
    run = train_tiny(tmp_path, "max_duration=1ba", "save_interval=1ba", "eval_interval=1ba")
    done = run_full(
        tmp_path,
        limit,
        "from pathlib import Path; from bge_pruning.export.extract import extract",
        f"extract(Path({str(run)!r}), Path('out'))",
    )
    assert_one_error(done)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    summary["full disks"] += 1


@pytest.mark.parametrize("limit", [100, 3000, 30_000, 150_000])
def test_a_training(limit, tiny_yaml, summary):
    """Tokenised texts, the teacher's vectors, metrics or a checkpoint: whatever comes first."""
    from bge_pruning.model_io.run_checkpoints import find_whole_checkpoint

    words = f"load_config([{str(tiny_yaml)!r}], ['max_duration=1ba', 'save_interval=1ba'])"
    done = run_full(
        tiny_yaml.parent,
        limit,
        "from bge_pruning.config.load import load_config; from bge_pruning.train import train",
        f"train({words})",
    )
    assert_one_error(done)
    left = [path.name for path in (tiny_yaml.parent / "processed").glob("*")]
    assert not [name for name in left if "partial" in name]
    run = tiny_yaml.parent / "runs" / "tiny"
    if list(run.glob("ep*")):  # a checkpoint that was cut off is not taken for one
        with pytest.raises(ValueError, match=r"To fix"):
            find_whole_checkpoint(run)
    summary["full disks"] += 1


FILES = "from bge_pruning.utils.files import"
WRITERS = {
    "text": (f"{FILES} write_text", "write_text('whole.md', 'x' * 10_000)"),
    "json": (f"{FILES} write_json", "write_json({'a': 'x' * 10_000}, 'whole.json')"),
    "array": (
        "import numpy as np; from pathlib import Path; "
        "from bge_pruning.datasets.hard_negatives import save_array",
        "save_array(np.zeros(10_000), Path('whole.npy'))",
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_texts_and_arrays(kind, tmp_path, summary):
    """Reports, results and caches are written through these."""
    assert_one_error(run_full(tmp_path, 1000, *WRITERS[kind]))
    assert not list(tmp_path.iterdir())
    summary["full disks"] += 1


def test_the_limit_is_felt_here(tmp_path):
    """Else the tests above would prove nothing."""
    done = run_full(tmp_path, 10, "", "open('x', 'w').write('x' * 100_000)")
    assert done.returncode == 1
    assert "File too large" in done.stderr
