"""Bytes of tensors that are alive together."""

import torch
from torch import nn

from bge_pruning.utils.memory import measure_peak_bytes


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
