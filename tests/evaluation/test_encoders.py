"""Models by name: folders, checkpoints, other architectures."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch

from bge_pruning.evaluation.encoders import (
    SentenceTransformerEncoder,
    check_model_name,
    count_parameters,
    load_encoder,
    untrained_encoder,
)
from bge_pruning.evaluation.floors import WordEmbeddings
from bge_pruning.export.extract import extract

TEXTS = ["the man plays guitar", "a dog", "the woman reads a red book in the park", "zzzz"]


def plain(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def assert_vectors(encoder, expected, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(encoder.encode(TEXTS).dense_vecs, expected, atol=atol)


@pytest.fixture(scope="module")
def run(train_tiny, tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(("kind", "projection"), [("model_folder", 0), ("projected_folder", 40)])
def test_a_folder_gives_what_sentence_transformers_gives(kind, projection, request):
    folder = request.getfixturevalue(kind)
    encoder, model = load_encoder(str(folder), batch_size=3), plain(folder)
    expected = model.encode(TEXTS)
    assert expected.shape == (4, projection or 32)
    assert_vectors(encoder, expected, 1e-5)
    assert encoder.names() == ("dense_vecs", "token_weights", "colbert_vecs")
    heads = (32 + 1) * 32 + (32 + 1)
    assert count_parameters(encoder)["heads"] == heads + projection * 32
    assert count_parameters(encoder)["total"] == heads + sum(p.numel() for p in model.parameters())


def test_modules_that_are_not_applied_here_are_left_to_sentence_transformers(
    projected_folder, tmp_path, caplog, monkeypatch
):
    """A rival is scored by its own vectors, not by those of its encoder."""
    monkeypatch.setattr(logging.getLogger("bge_pruning"), "propagate", True)
    folder = shutil.copytree(projected_folder, tmp_path / "x")
    path = folder / "2_Dense" / "config.json"
    tanh = {"activation_function": "torch.nn.modules.activation.Tanh"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **tanh}))
    encoder = load_encoder(str(folder))
    assert isinstance(encoder, SentenceTransformerEncoder)
    assert "only dense vectors, by sentence-transformers: " in caplog.text
    assert_vectors(encoder, plain(folder).encode(TEXTS))


def test_a_checkpoint_is_the_model_that_extraction_writes(run, tmp_path):
    extract(run, tmp_path / "model")
    extracted, names = load_encoder(str(tmp_path / "model")), ("dense_vecs", "token_weights")
    expected = extracted.encode(TEXTS, names)
    for name in (run, run / "latest-rank0.pt"):
        encoder = load_encoder(str(name))
        found = encoder.encode(TEXTS, names)
        np.testing.assert_allclose(found.dense_vecs, expected.dense_vecs, atol=1e-6)
        sparse = [each.lexical_weights.toarray() for each in (found, expected)]
        np.testing.assert_allclose(*sparse, atol=1e-6)
        assert count_parameters(encoder) == count_parameters(extracted)


def test_other_architectures_have_dense_vectors(electra_folder):
    encoder, model = load_encoder(str(electra_folder)), plain(electra_folder)
    assert isinstance(encoder, SentenceTransformerEncoder)
    assert encoder.names() == ("dense_vecs",)
    assert_vectors(encoder, model.encode(TEXTS, normalize_embeddings=True))
    counts, inner = count_parameters(encoder), model.transformers_model.encoder
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["encoder"] == sum(p.numel() for p in inner.parameters())
    assert counts["heads"] == 0
    assert encoder.encode([TEXTS[2]] * 2).truncated == 0
    assert load_encoder(str(electra_folder), max_length=6).encode([TEXTS[2]] * 2).truncated == 2


@pytest.mark.parametrize("kind", ["model_folder", "projected_folder", "electra_folder"])
def test_floors_of_any_model(kind, request):
    encoder = load_encoder(str(request.getfixturevalue(kind)), max_length=9, batch_size=2)
    before = encoder.encode(TEXTS).dense_vecs
    state = torch.random.get_rng_state()
    first, again, other = (untrained_encoder(encoder, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (first.max_length, first.batch_size) == (9, 2)
    vectors = [e.encode(TEXTS).dense_vecs for e in (first, again, other)]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert not np.allclose(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], before)
    np.testing.assert_array_equal(encoder.encode(TEXTS).dense_vecs, before)
    assert count_parameters(first) == count_parameters(encoder)
    table = encoder.word_table()
    words = [i for i in encoder.tokenize(TEXTS[:1])[0] if i not in encoder.special_ids]
    mean = table[words].mean(axis=0)
    found = WordEmbeddings(encoder).encode(TEXTS).dense_vecs
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert not found[3].any()  # no known word


def test_max_length_only_shortens(model_folder):
    assert load_encoder(str(model_folder), max_length=7).max_length == 7
    assert load_encoder(str(model_folder), max_length=700).max_length == 128
    with pytest.raises(ValueError, match="max_length 2 leaves no room for text"):
        load_encoder(str(model_folder), max_length=2)


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none is not a folder\. To fix, give a model's"):
        load_encoder(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="a/b/c is not a folder"):
        check_model_name("a/b/c")
    message = "holds neither a model .* nor a run's checkpoint. To fix, give the folder of a model"
    with pytest.raises(FileNotFoundError, match=message):
        check_model_name(str(tmp_path))
    check_model_name("owner/name")


def test_a_folder_that_is_not_complete(electra_folder, tmp_path):
    shutil.copytree(electra_folder, tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x cannot be loaded on cpu \(.*\)\. To fix, check the"):
        load_encoder(str(tmp_path / "x"))
    (tmp_path / "x" / "modules.json").unlink()
    with pytest.raises(ValueError, match=r"has no modules\.json, so its pooling is unknown\. To"):
        load_encoder(str(tmp_path / "x"))


def test_a_rival_whose_weights_are_broken(electra_folder):
    encoder = load_encoder(str(electra_folder))
    with torch.no_grad():
        encoder.transformer().get_input_embeddings().weight.fill_(float("nan"))
    message = "dense_vecs of .*/tiny-electra are not finite: its weights are broken. To fix, use an"
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS)


def test_a_model_without_a_transformer():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    static = StaticEmbedding(Tokenizer(WordLevel({"a": 0})), np.zeros((1, 4), np.float32))
    model = SentenceTransformer(modules=[static], device="cpu")
    with pytest.raises(ValueError, match="w: StaticEmbedding is not a transformer. To fix, give a"):
        SentenceTransformerEncoder(model, "w")


def test_bfloat16_is_near_and_only_of_models_that_are_computed_here(model_folder, electra_folder):
    names = ("dense_vecs", "token_weights", "colbert_vecs")
    full, half = (load_encoder(str(model_folder), precision=kind) for kind in ("fp32", "bf16"))
    wanted, found = (encoder.encode(TEXTS, names) for encoder in (full, half))
    assert found.multi_vectors.vectors.dtype == torch.float32
    for name in ("dense_vecs", "lexical_weights"):
        difference = abs(getattr(found, name) - getattr(wanted, name)).max()
        assert 0 < difference < 0.02  # other products, near those of float32
    assert untrained_encoder(half, 0).half and not untrained_encoder(full, 0).half
    with pytest.raises(ValueError, match="precision is bf16, but .* another library. To fix, use"):
        load_encoder(str(electra_folder), precision="bf16")
