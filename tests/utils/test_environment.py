"""The machine and the libraries that a number was measured with."""

import os
import platform

import mteb
import torch

from bge_pruning.utils import environment
from bge_pruning.utils.environment import collect_versions, describe_machine


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
