"""The batches of the benchmark: what is in them, and where the teacher's vectors come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bge_pruning.workflows.training_batches import FIXED, GROUPED, RANDOM, make_batches

PAD = 1


@pytest.fixture
def kinds(token_texts, tmp_path):
    return make_batches(token_texts, 8, 12, 5, PAD, 32, tmp_path)


def test_batches_of_every_kind(kinds, token_texts):
    assert list(kinds) == [FIXED, RANDOM, GROUPED]
    for batches in kinds.values():
        made = [batches.make(index, cached=False) for index in range(len(batches))]
        assert len(made) == 5
        assert all(batch["teacher_dense_vecs"].shape == (8, 1, 32) for batch in made)
        masks = [batch["attention_mask"] for batch in made]
        assert [int(mask.sum()) for mask in masks] == batches.lengths.sum(axis=1).tolist()
        assert [mask.numel() for mask in masks] == batches.padded.tolist()
        assert masks[batches.widest].numel() == max(mask.numel() for mask in masks)
        for batch in made:
            assert torch.equal(batch["input_ids"] == PAD, batch["attention_mask"] == 0)
    assert kinds[FIXED].make(0, cached=False)["input_ids"].shape == (8, 1, 12)
    assert kinds[FIXED].padded.sum() == kinds[FIXED].lengths.sum()
    assert kinds[RANDOM].lengths.sum() == kinds[GROUPED].lengths.sum() == token_texts.lengths.sum()
    assert kinds[GROUPED].padded.sum() < kinds[RANDOM].padded.sum()


def test_vectors_are_read_from_the_file_or_ready(kinds):
    for batches in kinds.values():
        assert not batches.plain.teacher
        assert isinstance(batches.cached.teacher["dense_vecs"], np.memmap)
        for index in range(len(batches)):
            ready, read = (batches.make(index, cached) for cached in (False, True))
            assert ready.keys() == read.keys()
            for name, value in ready.items():
                assert name == "lengths" or torch.equal(value, read[name]), name
            assert ready["teacher_dense_vecs"] is batches.targets[index]
            assert read["teacher_dense_vecs"] is not batches.targets[index]


def test_too_few_texts(token_texts, tmp_path):
    with pytest.raises(ValueError, match=r"40 texts are too few for 6 batches of 8\. To fix"):
        make_batches(token_texts, 8, 12, 6, PAD, 32, tmp_path)


@pytest.mark.gpu
def test_batches_are_moved_to_the_gpu(token_texts, tmp_path):
    batches = make_batches(token_texts, 8, 12, 5, PAD, 32, tmp_path, "cuda")[RANDOM]
    there = make_batches(token_texts, 8, 12, 5, PAD, 32, tmp_path / "cpu")[RANDOM].make(
        0, cached=True
    )
    for cached in (False, True):
        found = batches.make(0, cached)
        assert found.pop("lengths") == there["lengths"]
        for name, value in found.items():
            assert value.is_cuda and torch.equal(value.cpu(), there[name]), name
