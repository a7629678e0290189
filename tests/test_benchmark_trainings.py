"""The trainings of the benchmark: what they are fed, and that each trains its own copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bge_pruning.benchmark_trainings import (
    FIXED,
    GROUPED,
    RANDOM,
    huggingface_model,
    make_batches,
    make_trainings,
)
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.models.pretrained import load_base_model


@pytest.fixture
def base(model_folder):
    return load_base_model(str(model_folder))


@pytest.fixture(scope="module")
def texts() -> TokenizedTexts:
    """Forty texts of 3 to 20 tokens; no token is padding."""
    generator = np.random.default_rng(2)
    lengths = generator.integers(3, 21, 40)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return TokenizedTexts(generator.integers(4, 60, starts[-1]).astype(np.int32), starts, 0)


@pytest.fixture
def batches(texts):
    return make_batches(texts, 8, 12, 5, pad=1, hidden=32)


def test_batches_of_every_kind(batches, texts):
    assert list(batches) == [FIXED, RANDOM, GROUPED]
    for kind in batches.values():
        assert [len(batch["input_ids"]) for batch in kind] == [8] * 5
        assert all(batch["teacher_dense_vecs"].shape == (8, 1, 32) for batch in kind)
    for batch in batches[FIXED]:
        assert batch["input_ids"].shape == (8, 1, 12)
        assert bool(batch["attention_mask"].all()) and not (batch["input_ids"] == 1).any()
    masks = {
        kind: [batch["attention_mask"] for batch in batches[kind]] for kind in (RANDOM, GROUPED)
    }
    tokens = {kind: sum(int(mask.sum()) for mask in found) for kind, found in masks.items()}
    assert tokens[RANDOM] == tokens[GROUPED] == texts.lengths.sum()
    padded = {kind: sum(mask.numel() for mask in found) for kind, found in masks.items()}
    assert padded[GROUPED] < padded[RANDOM]


def test_every_training_trains_its_own_copy(base, batches):
    before = {name: value.clone() for name, value in base.backbone.state_dict().items()}
    for name, training in make_trainings(base, "cpu", False).items():
        start = {n: p.detach().clone() for n, p in training.model.named_parameters()}
        training.step(batches[RANDOM][0])
        moved = {n for n, p in training.model.named_parameters() if not torch.equal(p, start[n])}
        assert any(n.endswith("layer.0.output.dense.weight") for n in moved), name
        gates = any(n.startswith("l0_module.log_alpha") for n in moved)
        assert gates == ("gates" in name)
    for name, value in base.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_plain_is_the_same_model(base, batches):
    """Without gates ours is transformers'."""
    batch = batches[RANDOM][0]
    ids, mask = batch["input_ids"][:, 0], batch["attention_mask"][:, 0]
    plain = huggingface_model(base).eval()
    with torch.no_grad():
        theirs = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = base.backbone(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)
