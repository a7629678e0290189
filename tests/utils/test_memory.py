"""Bytes of tensors that are alive together."""

import pytest
import torch
from torch import nn

from bge_pruning.utils import model_analysis as memory
from bge_pruning.utils.model_analysis import free_bytes, measure_peak_bytes


def test_what_is_freed_makes_room():
    def action():
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + 1
        del first
        third = second * 2
        del second, third
        return torch.zeros(10)

    assert measure_peak_bytes(action) == 8000


def test_views_and_weights_take_nothing():
    layer = nn.Linear(100, 100)
    inputs = torch.zeros(5, 100)

    def action():
        with torch.inference_mode():
            return layer(inputs).view(-1)[:10].reshape(2, 5)

    assert measure_peak_bytes(action) == 5 * 100 * 4


def test_changes_in_place_take_nothing():
    values = torch.zeros(100)
    assert measure_peak_bytes(lambda: values.add_(1).mul_(2)) == 0


def test_kept_activations_of_training_count():
    layers = nn.Sequential(*(nn.Linear(50, 50) for _ in range(4)))
    inputs = torch.zeros(8, 50)

    def forward():
        with torch.inference_mode():
            layers(inputs)

    def train():
        layers(inputs).sum().backward()

    assert measure_peak_bytes(forward) <= 2 * 8 * 50 * 4
    assert measure_peak_bytes(train) >= 4 * 50 * 50 * 4  # the gradients of the weights


def test_free_memory_is_what_the_system_can_give(tmp_path, monkeypatch):
    assert free_bytes() > 1_000_000
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    memory.MEMORY.write_text("MemFree:  1 kB\nMemAvailable:  2048 kB\nHugePages_Total:  0\n")
    assert free_bytes() == 2 * 2**20


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_counts():
    weights = torch.ones(1 << 20, device="cuda")  # 4 MiB, not counted

    def action():
        first = weights * 2
        second = first + 1
        del first
        return second * 2

    assert measure_peak_bytes(action, "cuda") == 2 * 4 * 2**20
    before = free_bytes("cuda")
    kept = torch.ones(1 << 28, device="cuda")  # 1 GiB
    assert before - free_bytes("cuda") >= kept.nbytes
    del kept
    assert before - free_bytes("cuda") < 2**26  # kept by torch, and free for tensors
