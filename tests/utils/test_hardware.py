"""Names of processors, and free memory."""

from __future__ import annotations

import platform

import pytest

from bge_pruning.utils import hardware
from bge_pruning.utils.hardware import free_bytes, processor_name


def test_name_of_the_cpu(monkeypatch, tmp_path):
    assert processor_name("cpu")
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    assert processor_name("cpu") == platform.machine()
    text = "processor\t: 0\nmodel name\t: A CPU: fast\n\nprocessor\t: 1\nmodel name\t: Other\n"
    (tmp_path / "cpuinfo").write_text(text)
    assert processor_name("cpu") == "A CPU: fast"


def test_free_memory(monkeypatch, tmp_path):
    assert free_bytes("cpu") > 2**20
    monkeypatch.setattr(hardware, "MEMORY_INFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:   300 kB\n")
    assert free_bytes("cpu") == 300 * 1024


@pytest.mark.gpu
def test_the_gpu():
    assert processor_name("cuda") and free_bytes("cuda") > 2**20
