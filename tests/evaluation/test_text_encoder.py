"""Texts to outputs: the same as one text at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bge_pruning.evaluation import text_encoder
from bge_pruning.evaluation.multi_vector import encode_queries
from bge_pruning.evaluation.scoring import score_tasks
from bge_pruning.evaluation.search import MODES
from bge_pruning.evaluation.tasks import beir_task
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.export.extract import extract
from bge_pruning.model_io.checkpoint import find_checkpoint, load_trained_model
from bge_pruning.model_io.pretrained import load_base_model

TEXTS = ["the man plays the guitar", "a", "dog cat child in the park today", "the the the dog the"]
TEXTS.append("a horse rides fast and the woman reads a red book")
BOTH = ("dense_vecs", "token_weights")


def one_by_one(encoder: TextEncoder, text: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.from_numpy(encoder.tokenize([text])[0].astype(np.int64))[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return ids, encoder.heads.outputs(encoder.backbone(ids, mask), mask)


def test_outputs_are_those_of_one_text_at_a_time_in_order(encoder):
    found = encoder.encode(TEXTS, BOTH)
    for row, text in enumerate(TEXTS):
        ids, outputs = one_by_one(encoder, text)
        np.testing.assert_allclose(found.dense_vecs[row], outputs["dense_vecs"][0], atol=1e-5)
        expected: dict[int, float] = {}
        weights = outputs["token_weights"][0].tolist()
        for token, weight in zip(ids[0].tolist(), weights, strict=True):
            if token not in encoder.special_ids and weight > expected.get(token, 0.0):
                expected[token] = weight
        sparse = found.lexical_weights[row].tocoo()
        entries = dict(zip(sparse.col.tolist(), sparse.data.tolist(), strict=True))
        assert entries == pytest.approx(expected, abs=1e-5)
    assert found.lexical_weights.shape == (len(TEXTS), 99)
    assert found.lexical_weights.nnz > 5


def test_only_what_is_asked_for_and_no_texts(encoder):
    assert encoder.encode(TEXTS).lexical_weights is None
    assert encoder.encode(TEXTS, ("token_weights",)).dense_vecs is None
    found = encoder.encode([], BOTH)
    assert found.lexical_weights.shape == (0, 99)
    assert found.dense_vecs.shape == (0, 32)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_ranks_share_the_texts_and_all_get_everything(count, model_folder, encoder, run_ranks):
    expected = encoder.encode(TEXTS, BOTH)
    base = load_base_model(str(model_folder))
    seen = []
    base.backbone.embeddings.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))

    def work(ranks):
        return TextEncoder(base, batch_size=2, ranks=ranks).encode(TEXTS, BOTH)

    for found in run_ranks(count, work):
        np.testing.assert_allclose(found.dense_vecs, expected.dense_vecs, atol=1e-6)
        difference = found.lexical_weights - expected.lexical_weights
        assert abs(difference).max() < 1e-6
        assert found.lexical_weights.nnz == expected.lexical_weights.nnz
    assert sum(seen) == len(TEXTS)  # each text once, whatever the number of ranks


def test_dense_vectors_alone_are_projected(projected_folder, encoder):
    found = TextEncoder(load_base_model(str(projected_folder)), batch_size=2)
    assert (found.dense_size, encoder.dense_size) == (40, 32)
    ours, plain = found.encode(TEXTS, BOTH), encoder.encode(TEXTS, BOTH)
    expected = plain.dense_vecs @ found.base.projection.numpy().T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(ours.dense_vecs, expected, atol=1e-6)
    assert (ours.lexical_weights != plain.lexical_weights).nnz == 0
    late = [encode_queries(each, TEXTS).vectors for each in (found, encoder)]
    np.testing.assert_array_equal(*late)
    assert found.encode(TEXTS, ("token_weights",)).dense_vecs is None
    assert found.encode([]).dense_vecs.shape == (0, 40)
    assert found.word_table().shape == (99, 32)


def test_through_masks_it_is_the_extracted_model(tmp_path, train_tiny, collection):
    """Vectors to 1e-6, and the same nDCG; the vectors are 0 in what is off."""
    run = train_tiny(tmp_path, "loss.distillation_sparse=1", "loss.distillation_colbert=1")
    trained = load_trained_model(find_checkpoint(run))
    info = extract(run, tmp_path / "small")
    small = load_base_model(str(tmp_path / "small"))
    big = replace(small, shape=trained.shape, backbone=trained.backbone, heads=trained.heads)
    masks = trained.l0_module.deterministic_masks()
    encoders = [TextEncoder(big, masks=masks), TextEncoder(small)]
    masked, cut = (e.encode(TEXTS, BOTH) for e in encoders)
    kept = info.kept.hidden
    np.testing.assert_allclose(masked.dense_vecs[:, kept], cut.dense_vecs, atol=1e-6)
    assert not np.delete(masked.dense_vecs, kept, axis=1).any()
    sparse = [found.lexical_weights.toarray() for found in (masked, cut)]
    np.testing.assert_allclose(*sparse, atol=1e-6)
    late = [encode_queries(e, TEXTS).vectors for e in encoders]
    np.testing.assert_allclose(late[0], late[1], atol=1e-6)
    open_gates = TextEncoder(big).encode(TEXTS).dense_vecs
    assert np.abs(open_gates - masked.dense_vecs).max() > 1e-2
    ours, theirs = (score_tasks(e, [beir_task(collection)], list(MODES)) for e in encoders)
    for key, score in theirs.items():
        assert ours[key].values == score.values, key
        assert ours[key].samples.tolist() == score.samples.tolist()


def test_vectors_that_are_not_finite_are_refused(model_folder):
    base = load_base_model(str(model_folder))
    with torch.no_grad():
        base.heads.sparse_linear.bias.fill_(float("nan"))
    encoder = TextEncoder(base)
    message = r"token_weights of .*/tiny-xlmr are not finite: its weights are broken\. To fix, use"
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS, BOTH)
    assert np.isfinite(encoder.encode(TEXTS).dense_vecs).all()


def test_tokens_do_not_depend_on_the_chunks_and_are_cut_at_the_limit(encoder, monkeypatch):
    whole = encoder.tokenize(TEXTS)
    for chunk in (1, 3):
        monkeypatch.setattr(text_encoder, "CHUNK", chunk)
        parts = encoder.tokenize(TEXTS)
        assert parts.ids.tolist() == whole.ids.tolist()
        assert parts.starts.tolist() == whole.starts.tolist()
    short = TextEncoder(encoder.base, max_length=4).tokenize(TEXTS)
    assert (short.lengths.max(), short.truncated) == (4, 4)
