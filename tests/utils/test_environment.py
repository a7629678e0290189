"""The machine and the libraries that a number was measured with."""

import os
import platform
import subprocess
import sys
import time

import mteb
import torch

from bge_pruning.utils import environment
from bge_pruning.utils.environment import (
    OtherWork,
    collect_versions,
    describe_machine,
    load_note,
)


def test_the_machine_without_its_host_and_versions(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name : Some CPU @ 2 GHz\nmodel name : Some CPU @ 2 GHz\n")
    monkeypatch.setattr(environment, "CPU", file)
    cores = os.cpu_count()
    assert describe_machine() == {"cpu": "Some CPU @ 2 GHz", "cores": cores, "gpu": None}
    file.unlink()
    assert describe_machine() == {"cpu": platform.machine(), "cores": cores, "gpu": None}
    versions = collect_versions()
    assert versions["mteb"] == mteb.__version__
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_times_under_load_are_marked():
    """Another process works on a core, and this one waits."""
    burn = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", burn])
    try:
        with OtherWork() as work:
            time.sleep(1.5)
    finally:
        other.kill()
        other.wait()
    assert work.cores > 0.3
    with OtherWork() as own:
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
    assert own.cores < os.cpu_count()
    cores = os.cpu_count()
    assert load_note(cores, 0.1) == load_note(cores, None) == load_note(1, 0.0) == ""
    said = f"other programs kept 1.5 of {cores} cores busy, so that times are too long"
    assert load_note(cores, 1.5) == said
