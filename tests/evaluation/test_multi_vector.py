"""Multi-vector scores of pairs, beside the plain scores of everything with everything."""

import numpy as np
import pytest
import torch

from bge_pruning.evaluation import multi_vector
from bge_pruning.evaluation.multi_vector import encode_queries, score_pairs
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.model_io.pretrained import load_base_model

QUERIES = ["the man", "a dog in the park", "a"]
PASSAGES = ["the man plays the guitar", "a dog", "dog cat child in the park today", "there"]
PASSAGES.append("a horse rides fast and the woman reads a red book")


def multi_vectors(encoder: TextEncoder, text: str) -> np.ndarray:
    ids = torch.from_numpy(encoder.tokenize([text])[0].astype(np.int64))[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return encoder.heads.colbert_vecs(encoder.backbone(ids, mask), mask)[0].numpy()


# Query and passage of each pair.
PAIRS = np.array([(q, p) for q in range(3) for p in range(5) if (q + p) % 4]).T
PAIRS = tuple(PAIRS[:, np.random.default_rng(0).permutation(PAIRS.shape[1])])


@pytest.mark.parametrize("at_once", [1, 20, 1 << 24])
def test_scores_are_flag_embeddings(at_once, encoder, monkeypatch):
    """Mean over the query's tokens of the largest product, in the order of the pairs."""
    from FlagEmbedding import BGEM3FlagModel

    monkeypatch.setattr(multi_vector, "PRODUCTS", at_once)
    found = score_pairs(encoder, encode_queries(encoder, QUERIES), PASSAGES, PAIRS)
    for value, query, passage in zip(found, *PAIRS, strict=True):
        vectors = [multi_vectors(encoder, text) for text in (QUERIES[query], PASSAGES[passage])]
        expected = BGEM3FlagModel.colbert_score(None, *vectors)
        assert value == pytest.approx(float(expected), abs=1e-5)


def test_a_passage_is_embedded_once_and_others_never(encoder):
    seen = []
    hook = encoder.backbone.embeddings.register_forward_hook(
        lambda _, args, __: seen.append(len(args[0]))
    )
    queries = encode_queries(encoder, QUERIES)
    seen.clear()
    score_pairs(encoder, queries, PASSAGES, (np.array([0, 1, 2, 0]), np.array([3, 3, 3, 1])))
    hook.remove()
    assert sum(seen) == 2
    nothing = np.zeros(0, np.int64)
    assert score_pairs(encoder, queries, PASSAGES, (nothing, nothing)).shape == (0,)


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_share_the_texts_and_all_get_every_score(count, model_folder, encoder, run_ranks):
    queries = encode_queries(encoder, QUERIES)
    expected = score_pairs(encoder, queries, PASSAGES, PAIRS)
    base = load_base_model(str(model_folder))
    seen = []
    base.backbone.embeddings.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))

    def work(ranks):
        part = TextEncoder(base, batch_size=2, ranks=ranks)
        found = encode_queries(part, QUERIES)
        return found, score_pairs(part, found, PASSAGES, PAIRS)

    for found, scores in run_ranks(count, work):
        assert found.starts.tolist() == queries.starts.tolist()
        np.testing.assert_allclose(found.vectors, queries.vectors, atol=1e-6)
        np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert sum(seen) == len(QUERIES) + len(PASSAGES)
