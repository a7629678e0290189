"""The trainings of the benchmark: what each trains, and that it trains weights of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.reports.efficiency_table import UNCOMPILED
from bge_pruning.utils.records import CACHED, COMPILED, GATES, PLAIN, TEACHER, TRAININGS
from bge_pruning.workflows.training_batches import huggingface_model, make_trainings


@pytest.fixture
def base(model_folder):
    return load_base_model(str(model_folder))


@pytest.fixture
def batch():
    """Eight texts of 4 to 11 tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(11) < torch.arange(4, 12)[:, None]).long()
    ids = torch.randint(4, 60, mask.shape, generator=generator) * mask + (1 - mask)
    vectors = F.normalize(torch.randn(8, 32, generator=generator), dim=-1)
    return {
        "input_ids": ids[:, None],
        "attention_mask": mask[:, None],
        "teacher_dense_vecs": vectors[:, None],
    }


def weights(training):
    return {name: value.detach().clone() for name, value in training.model.named_parameters()}


def test_every_training_trains_its_own_weights(base, batch):
    trainings = make_trainings(base, "cpu", False)
    assert list(trainings) == list(UNCOMPILED)
    assert [name for name, training in trainings.items() if training.cached] == [CACHED]
    before = {name: weights(training) for name, training in trainings.items()}
    for name, training in trainings.items():
        for other in list(trainings)[list(trainings).index(name) :]:
            for key, value in weights(trainings[other]).items():
                assert torch.equal(value, before[other][key]), (name, other, key)
        training.step(batch)
        moved = {k for k, value in weights(training).items() if (value != before[name][k]).any()}
        assert any(key.endswith("layer.0.output.dense.weight") for key in moved), name
        assert any(key.startswith("l0_module.log_alpha") for key in moved) == (name != PLAIN)


def test_compiled_is_compiled(base):
    trainings = make_trainings(base, "cpu", False, (GATES, COMPILED))
    backbones = {name: training.model.backbone for name, training in trainings.items()}
    assert {name: b.compiled for name, b in backbones.items()} == {GATES: False, COMPILED: True}


def test_a_cached_teacher_trains_as_ready_targets_do(base, batch):
    trainings = make_trainings(base, "cpu", False, (GATES, TEACHER, CACHED))
    for training in trainings.values():
        training.step(batch)
    found = {name: weights(training) for name, training in trainings.items()}
    assert all(torch.equal(value, found[CACHED][key]) for key, value in found[GATES].items())
    # The teacher's own vectors are others than those of the batch.
    assert any((value != found[TEACHER][key]).any() for key, value in found[GATES].items())


@pytest.mark.parametrize("name", TRAININGS)
def test_the_last_training_takes_over_the_weights(base, name):
    model = make_trainings(base, "cpu", False, (name,))[name].model
    words = base.backbone.embeddings.word_embeddings.weight
    backbone = model if name == PLAIN else model.backbone
    assert backbone.embeddings.word_embeddings.weight.data_ptr() == words.data_ptr()


def test_plain_is_the_same_model(base, batch):
    """Without gates ours is transformers'."""
    ids, mask = batch["input_ids"][:, 0], batch["attention_mask"][:, 0]
    plain = huggingface_model(base).eval()
    with torch.no_grad():
        theirs = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = base.backbone(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)
