"""Models of random weights: they work as any other, whatever their size."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from bge_pruning.evaluation.random_model import make_tokenizer_files, random_base_model
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.model_io.model_files import read_special_ids, read_vocabulary
from bge_pruning.models.encoder_shape import EncoderShape

SHAPE = EncoderShape(16, 2, 2, 32, 300, head_dim=8, max_position_embeddings=40, colbert_dim=16)


def test_a_seed_is_a_model_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    models = [random_base_model(SHAPE, "random", seed=seed) for seed in (1, 1, 2)]
    weights = [model.backbone.embeddings.word_embeddings.weight for model in models]
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
    if size == 10:
        return
    # Words are one token, and other text is known.
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("Yes. planes").tokens == ["<s>", "▁Yes.", "▁planes", "</s>"]
    assert "<unk>" not in tokenizer.encode("(Any) ASCII text: 1,024!").tokens
    assert tokenizer.encode("a", "b").ids.count(2) == 3
