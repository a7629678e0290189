"""Which trainings fit into memory together."""

from __future__ import annotations

import pytest
import torch

from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.reports.efficiency_table import UNCOMPILED
from bge_pruning.utils.model_analysis import measure_peak_bytes
from bge_pruning.utils.records import CACHED, COMPILED, GATES, PLAIN, TEACHER
from bge_pruning.workflows.random_model import random_base_model
from bge_pruning.workflows.training_batches import make_trainings
from bge_pruning.workflows.training_benchmark import MARGIN, check_memory, compute_needed_bytes

GB = 1e9
ALL = UNCOMPILED


@pytest.fixture
def bge_m3_shape():
    return EncoderShape(1024, 16, 24, 4096, 250_002, 64, 8194, colbert_dim=1024)


def test_bge_m3_beside_plain_fine_tuning_fits_24_gb(bge_m3_shape):
    needed = compute_needed_bytes(bge_m3_shape, (PLAIN, GATES), 256, 256, half=False)
    assert 17 * GB < needed < 18 * GB
    check_memory(bge_m3_shape, (PLAIN, GATES), 256, 256, False, 20 * GB)
    assert compute_needed_bytes(bge_m3_shape, ALL, 256, 256, half=False) > 24 * GB


def test_padding_counts_for_plain_and_compiled_layers(bge_m3_shape):
    def needed(name, padded):
        return compute_needed_bytes(bge_m3_shape, (name,), 4000, padded, half=False)

    for name in (PLAIN, COMPILED):
        assert needed(name, 16000) > needed(name, 4000)
    assert needed(GATES, 16000) == needed(GATES, 4000)


def test_advice_names_fewer_trainings(bge_m3_shape):
    message = (
        r"4 trainings \(plain, gates, teacher, cached\) of this model would take about 35\.\d GB, "
        r"and 20\.0 GB are free\. To fix, pass --trainings plain gates \(17\.5 GB\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        check_memory(bge_m3_shape, ALL, 256, 256, False, 20 * GB)


def test_advice_names_smaller_batches(bge_m3_shape):
    message = (
        r"2 trainings \(gates, cached\) .* To fix, pass --trainings gates \(\d+\.\d GB\), or lower "
        r"--batch-size, --max-length and --fixed-length to 2,000 tokens a batch \(now 8,000\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        check_memory(bge_m3_shape, (GATES, CACHED), 6000, 8000, False, 20 * GB)


def test_nothing_fits(bge_m3_shape):
    message = r"1 training \(plain\) .* To fix, choose a smaller model, or a machine with more mem"
    with pytest.raises(ValueError, match=message):
        check_memory(bge_m3_shape, (PLAIN,), 256, 256, False, 2 * GB)


@pytest.mark.parametrize("name", [PLAIN, GATES, TEACHER])
def test_the_estimate_is_near_the_measurement(name):
    """Of a step beside weights, moments and gradients, which are known."""
    shape = EncoderShape(128, 4, 4, 512, 500, 32, 130, colbert_dim=128)
    lengths = torch.tensor([100, 60, 128, 100, 20, 90, 128, 110] * 2)
    mask = (torch.arange(128) < lengths[:, None]).long()
    ids = torch.randint(4, 500, mask.shape) * mask + (1 - mask)
    batch = {"input_ids": ids[:, None], "attention_mask": mask[:, None]}
    batch["teacher_dense_vecs"] = torch.nn.functional.normalize(torch.randn(16, 1, 128), dim=-1)
    training = make_trainings(random_base_model(shape, "random"), "cpu", False, (name,))[name]
    training.step(batch)
    found = measure_peak_bytes(lambda: training.step(batch))
    needed = compute_needed_bytes(shape, (name,), int(mask.sum()), mask.numel(), half=False)
    kept = (16 if name == TEACHER else 12) * count_parameters(shape).total
    assert needed / MARGIN - kept == pytest.approx(found, rel=0.15)
