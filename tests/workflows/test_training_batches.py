"""The batches and the trainings of the benchmark: what is in them, and what each trains."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.reports.efficiency_table import USUAL
from bge_pruning.utils.records import CACHED, COMPILED, GATES, PLAIN, TEACHER, TRAININGS
from bge_pruning.workflows.training_batches import (
    FIXED,
    GROUPED,
    RANDOM,
    huggingface_model,
    make_batches,
    make_trainings,
)

PAD = 1


@pytest.fixture
def kinds(token_texts, tmp_path):
    return make_batches(token_texts, 8, 12, 5, PAD, 32, tmp_path)


def test_batches_of_every_kind(kinds, token_texts):
    assert list(kinds) == [FIXED, RANDOM, GROUPED]
    for batches in kinds.values():
        made = [batches.make(index, cached=False) for index in range(5)]
        assert len(batches.rows) == 5
        assert all(batch["teacher_dense_vecs"].shape == (8, 1, 32) for batch in made)
        masks = [batch["attention_mask"] for batch in made]
        assert [int(mask.sum()) for mask in masks] == batches.lengths.sum(axis=1).tolist()
        assert [mask.numel() for mask in masks] == batches.padded.tolist()
        for batch in made:
            assert torch.equal(batch["input_ids"] == PAD, batch["attention_mask"] == 0)
    assert kinds[FIXED].make(0, cached=False)["input_ids"].shape == (8, 1, 12)
    assert kinds[FIXED].padded.sum() == kinds[FIXED].lengths.sum()
    assert kinds[RANDOM].lengths.sum() == kinds[GROUPED].lengths.sum() == token_texts.lengths.sum()
    assert kinds[GROUPED].padded.sum() < kinds[RANDOM].padded.sum()


def test_vectors_are_read_from_the_file_or_ready(kinds):
    for batches in kinds.values():
        assert not batches.plain.teacher
        (values,) = batches.cached.teacher.outputs["dense_vecs"].values
        assert isinstance(values, np.memmap)
        for index in range(5):
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
def test_batches_are_moved_to_the_gpu(token_texts, kinds, tmp_path):
    batches = make_batches(token_texts, 8, 12, 5, PAD, 32, tmp_path / "gpu", "cuda")[RANDOM]
    expected = kinds[RANDOM].make(0, cached=True)
    for cached in (False, True):
        found = batches.make(0, cached)
        assert found.pop("lengths") == expected["lengths"]
        for name, value in found.items():
            assert value.is_cuda and torch.equal(value.cpu(), expected[name]), name


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
    inputs = {"input_ids": ids, "attention_mask": mask, "teacher_dense_vecs": vectors}
    return {name: value[:, None] for name, value in inputs.items()}


def weights(training):
    return {name: value.detach().clone() for name, value in training.model.named_parameters()}


def test_every_training_trains_its_own_weights(base, batch):
    trainings = make_trainings(base, "cpu", False)
    assert list(trainings) == list(USUAL)
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
