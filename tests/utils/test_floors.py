import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from bge_pruning.utils.floors import build_random_weights_model, build_word_embedding_model

SENTENCES = ["a man plays guitar", "the dog runs", "a a cat"]


def test_random_weights_have_the_same_shape_but_not_the_values(tiny_folder, tiny_model):
    floor = build_random_weights_model(str(tiny_folder), device="cpu")
    new, old = floor.transformers_model.state_dict(), tiny_model.transformers_model.state_dict()
    assert {key: value.shape for key, value in new.items()} == {
        key: value.shape for key, value in old.items()
    }
    key = "encoder.layer.1.attention.self.query.weight"
    assert not torch.equal(new[key], old[key])
    # initializer_range of the config: the weights are those of a new transformers model
    assert new[key].std().item() == pytest.approx(0.5, rel=0.2)
    assert [type(module) for module in floor] == [type(module) for module in tiny_model]
    assert not floor.training


def test_random_weights_follow_the_seed_and_leave_the_callers_state(tiny_folder):
    state = torch.get_rng_state()
    a, b, c = (
        build_random_weights_model(str(tiny_folder), device="cpu", seed=s).encode(SENTENCES)
        for s in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(a, b)
    assert not np.allclose(a, c)


def test_word_embeddings_are_the_normalised_mean_of_rows(tiny_model):
    floor = build_word_embedding_model(tiny_model)
    rows = tiny_model.transformers_model.get_input_embeddings().weight.detach()
    for text, vector in zip(SENTENCES, floor.encode(SENTENCES), strict=True):
        ids = tiny_model.tokenizer(text, add_special_tokens=False)["input_ids"]
        mean = torch.nn.functional.normalize(rows[ids].mean(0), dim=0)
        np.testing.assert_allclose(vector, mean.numpy(), atol=1e-6)


def test_word_embeddings_leave_special_tokens_out(tiny_model):
    floor = build_word_embedding_model(tiny_model)
    plain, unknown, nothing = floor.encode(["dog", "dog zebra <mask> </s>", "zebra"])
    np.testing.assert_allclose(plain, unknown, atol=1e-6)
    assert not nothing.any()
    assert (
        tiny_model.transformers_model.get_input_embeddings().weight[3].any()
    )  # copied, not shared


def test_word_embeddings_cut_where_the_model_cuts(tiny_folder):
    model = SentenceTransformer(str(tiny_folder), device="cpu")
    model.max_seq_length = 4  # <s>, two words, </s>
    floor = build_word_embedding_model(model)
    long, short = floor.encode(["dog cat man woman", "dog cat"])
    np.testing.assert_allclose(long, short, atol=1e-6)


def test_no_transformer_no_floor(tiny_model):
    floor = build_word_embedding_model(tiny_model)
    with pytest.raises(ValueError, match="StaticEmbedding is not a transformer"):
        build_word_embedding_model(floor)
