"""Search in every mode, beside scores of everything with everything."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch

from bge_pruning.datasets.retrieval_collection import read_collection
from bge_pruning.evaluation import search
from bge_pruning.evaluation.search import MODES, CorpusCache, SearchModel, check_modes
from bge_pruning.models.embedding_heads import Outputs, compute_scores


@pytest.fixture(scope="module")
def data(collection):
    return read_collection(collection)


class Metadata:
    name, type = "tiny", "Retrieval"


def indexed(corpora: CorpusCache, data, mode: str, **options) -> SearchModel:
    model = SearchModel(corpora, mode, None, **options)
    model.index(data.corpus, task_metadata=Metadata, hf_split="test", hf_subset="default")
    return model


def find(encoder, data, mode: str, top_k: int = 1000, **options) -> dict[str, dict[str, float]]:
    model = indexed(CorpusCache(encoder, MODES[mode]), data, mode, **options)
    return model.search(data.queries, task_metadata=Metadata, top_k=top_k)


@pytest.fixture(scope="module")
def plain(encoder, data) -> dict[str, np.ndarray]:
    """Scores of every query with every passage, by output, as training computes them."""

    def outputs(texts: list[str]) -> Outputs:
        from bge_pruning.datasets.embedding_dataset import pad_texts

        tokens = encoder.tokenize(texts)
        ids, mask = pad_texts([tokens[i] for i in range(len(tokens))], encoder.pad_token_id)
        with torch.no_grad():
            return Outputs(ids, mask, **encoder.heads.outputs(encoder.backbone(ids, mask), mask))

    queries = outputs([row["text"] for row in data.queries])
    passages = outputs([f"{row['title']} {row['text']}".strip() for row in data.corpus])
    scores = compute_scores(queries, passages, encoder.special_ids).all()
    return {name: value.numpy() for name, value in scores.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at_once", [4, 128])
def test_scores_are_those_of_training(mode, at_once, encoder, data, plain, monkeypatch):
    monkeypatch.setattr(search, "QUERIES", at_once)
    found = find(encoder, data, mode)
    weights = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0}
    scores = sum(weights[name] * plain[name] for name in MODES[mode])
    for row, query in enumerate(data.queries):
        results = found[query["id"]]
        assert list(results.values()) == sorted(results.values(), reverse=True)
        # Of sparse vectors alone, passages without a token in common are not found.
        found_at = [i for i in range(len(data.corpus)) if mode != "sparse" or scores[row, i] > 0]
        assert results.keys() == {data.corpus[i]["id"] for i in found_at}
        for column in found_at:
            passage = data.corpus[column]["id"]
            assert results[passage] == pytest.approx(scores[row, column], abs=3e-6)

    for query, results in find(encoder, data, mode, top_k=5).items():  # the best are kept
        assert list(results.items()) == list(found[query].items())[:5]


def test_multi_vectors_are_compared_for_the_candidates_alone(encoder, data):
    hybrid = find(encoder, data, "dense+sparse", top_k=6)
    for mode in ("colbert", "all"):
        found = find(encoder, data, mode, candidates=6)
        for query, results in found.items():
            assert set(results) == set(hybrid[query])


def test_a_corpus_is_embedded_once_for_all_modes(encoder, data, monkeypatch):
    corpora = CorpusCache(encoder, ("dense", "sparse", "colbert"))
    monkeypatch.setattr(encoder, "encode", Mock(wraps=encoder.encode))
    for mode in MODES:
        indexed(corpora, data, mode)
    encoder.encode.assert_called_once()
    assert len(encoder.encode.call_args.args[0]) == len(data.corpus)


def test_multi_vectors_are_compared_once_for_all_modes(encoder, data, monkeypatch):
    monkeypatch.setattr(search, "score_pairs", Mock(wraps=search.score_pairs))
    corpora = CorpusCache(encoder, ("dense", "sparse", "colbert"))
    found = {}
    for queries in (data.queries, data.queries[:3]):
        for mode in ("colbert", "all"):
            found[mode] = indexed(corpora, data, mode).search(
                queries, task_metadata=Metadata, top_k=4
            )
    assert search.score_pairs.call_count == 2  # once for each set of queries
    alone = find(encoder, data, "all", 4)
    for query, results in found["all"].items():
        assert list(results) == list(alone[query])
        # Another number of queries in one matrix product rounds otherwise.
        assert results == pytest.approx(alone[query], abs=1e-5)


def test_multi_vectors_that_fit_are_kept_and_change_nothing(encoder, data, monkeypatch):
    def embedded() -> int:
        return sum(len(call.args[0]) for call in encoder.compute.call_args_list)

    monkeypatch.setattr(encoder, "compute", Mock(wraps=encoder.compute))
    kept = find(encoder, data, "all", 4)
    texts = len(data.corpus) + len(data.queries)
    assert embedded() == texts  # each of them once
    monkeypatch.setattr(search, "KEPT_BYTES", 0)
    again = find(encoder, data, "all", 4)
    assert embedded() > 2 * texts
    for query, results in kept.items():
        assert list(results) == list(again[query])
        assert results == pytest.approx(again[query], abs=1e-5)


def test_lists_to_rerank_are_refused(encoder, data):
    model = indexed(CorpusCache(encoder, ("dense",)), data, "dense")
    with pytest.raises(ValueError, match="a reranking task lists the passages.*To fix, choose"):
        model.search(data.queries, task_metadata=Metadata, top_k=3, top_ranked={"q0": ["d1"]})


@pytest.mark.parametrize(
    ("modes", "names", "message"),
    [
        (["dens"], ("dense_vecs",), "mode 'dens' is not one of dense, sparse.*To fix, choose one"),
        (
            ["dense", "all"],
            ("dense_vecs", "token_weights"),
            r"mode all needs colbert vectors, and m has .*choose among dense, sparse, dense.sparse",
        ),
        (["sparse"], ("dense_vecs",), "mode sparse needs sparse vectors.*choose among dense, or"),
    ],
)
def test_modes_that_are_refused(modes, names, message):
    with pytest.raises(ValueError, match=message):
        check_modes(modes, names, "m")
