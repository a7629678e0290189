"""Runs of random weights: read as any other, whatever their size."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.models.checkpoint import load_trained_model
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.model_files import read_special_ids, read_vocabulary
from bge_pruning.utils.random_run import make_tokenizer_files, random_base_model, write_random_run

SHAPE = EncoderShape(16, 2, 2, 32, 300, head_dim=8, max_position_embeddings=40, colbert_dim=16)
GATES = {
    "axes": ["layer"],
    "target": asdict(replace(SHAPE, num_hidden_layers=1)),
    "target_parameters": None,
    "seed": 3,
}


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_it_is_read_as_any_run(with_optimizer, tmp_path):
    checkpoint = write_random_run(tmp_path / "run", SHAPE, GATES, (), with_optimizer)
    model = load_trained_model(checkpoint)
    assert checkpoint == tmp_path / "run" / "latest-rank0.pt"
    assert model.shape == SHAPE
    assert model.l0_module.realised_shape().num_hidden_layers == 1
    assert model.metadata.max_seq_length == 38
    ids = torch.tensor([[0, 7, 8, 2]])
    hidden = model.backbone(ids, torch.ones_like(ids))
    assert hidden.isfinite().all() and float(hidden.detach().std()) > 0.1


def test_the_optimizers_state_is_two_more_models(tmp_path):
    sizes = [
        write_random_run(tmp_path / name, replace(SHAPE, vocab_size=9000), None, (), state)
        .stat()
        .st_size
        for name, state in (("without", False), ("with", True))
    ]
    assert sizes[1] - sizes[0] > 2 * 4 * 9000 * 16


def test_a_seed_is_a_model_and_leaves_the_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    weights = [
        load_trained_model(write_random_run(tmp_path / str(i), SHAPE, None, seed=seed))
        .backbone.embeddings.word_embeddings.weight.detach()
        .clone()
        for i, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_was_never_on_a_disk_embeds_texts():
    model = random_base_model(SHAPE, "random", ["planes"], seed=4)
    encoder = TextEncoder(model)
    assert encoder.tokenize(["planes planes"]).lengths.tolist() == [4]
    vectors = encoder.encode(["planes", "Yes."]).dense_vecs
    assert vectors.shape == (2, 16) and abs(float(vectors[0] @ vectors[1])) < 0.999
    again = TextEncoder(random_base_model(SHAPE, "random", ["planes"], seed=4))
    assert (again.encode(["planes", "Yes."]).dense_vecs == vectors).all()


@pytest.mark.parametrize("size", [10, 300, 25_000])
def test_the_tokenizer_has_as_many_tokens_as_asked_for(size):
    files = make_tokenizer_files(size, 40, ["planes", "Yes."])
    vocabulary = read_vocabulary(files)
    assert sorted(vocabulary.values()) == list(range(size))
    assert vocabulary["<mask>"] == size - 1
    assert read_special_ids(files) == {0, 1, 2, 3}
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 40


def test_words_are_one_token_and_other_text_is_known():
    from tokenizers import Tokenizer

    files = make_tokenizer_files(300, 40, ["planes", "Yes."])
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("Yes. planes").tokens == ["<s>", "▁Yes.", "▁planes", "</s>"]
    assert "<unk>" not in tokenizer.encode("(Any) ASCII text: 1,024!").tokens
    assert tokenizer.encode("a", "b").ids.count(2) == 3
