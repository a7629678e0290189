"""Retrieval scores: mteb's own, beside a baseline and floors."""

import mteb
import numpy as np
import pytest
import torch

from bge_pruning.evaluation.retrieval import METRICS, evaluate_retrieval, score_retrieval
from bge_pruning.evaluation.retrieval_floors import WordEmbeddings, with_random_weights
from bge_pruning.evaluation.search import MODES
from bge_pruning.evaluation.tasks import beir_task
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.models.pretrained import BaseModel, load_base_model


@pytest.fixture(scope="module")
def base(model_folder) -> BaseModel:
    return load_base_model(str(model_folder))


@pytest.fixture(scope="module")
def task(collection):
    return beir_task(collection)


@pytest.fixture(scope="module")
def entries(base, task) -> list[dict]:
    return evaluate_retrieval(with_random_weights(base, 5), base, [task], list(MODES))


# What mteb calls of itself and of sentence-transformers.
@pytest.mark.filterwarnings("ignore:The fill_missing parameter:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The `get_sentence_embedding_dimension`:FutureWarning")
def test_dense_scores_are_mtebs_of_the_same_model(base, task, model_folder):
    from sentence_transformers import SentenceTransformer

    ours = score_retrieval(TextEncoder(base), [task], ["dense"])[("tiny", "dense")]
    model = SentenceTransformer(str(model_folder), device="cpu")
    theirs = mteb.evaluate(
        model, [task], cache=None, show_progress_bar=False, co2_tracker=False
    ).task_results[0]
    for metric in METRICS:
        assert ours.values[metric] == pytest.approx(theirs.scores["test"][0][metric], abs=1e-4)
    assert np.mean(list(ours.by_query.values())) == pytest.approx(
        ours.values["ndcg_at_10"], abs=1e-4
    )
    assert len(ours.by_query) == 15


def test_every_mode_and_metric_has_an_entry(entries):
    assert [(e["mode"], e["metric"]) for e in entries] == [(m, k) for m in MODES for k in METRICS]
    for entry in entries:
        assert entry["task"] == "tiny"
        assert entry["queries"] == 15
        assert 0 <= entry["value"] <= 1
        assert entry["floor"] == max(entry["floors"].values())
        expected = {"random_weights"} | ({"word_embeddings"} if entry["mode"] == "dense" else set())
        assert set(entry["floors"]) == expected
        assert entry["retention"] == pytest.approx(entry["value"] / entry["baseline"])


def test_intervals_and_tests_are_of_the_main_metric(entries):
    for entry in entries:
        assert ("interval" in entry) == ("p_value" in entry) == (entry["metric"] == "ndcg_at_10")
        if "interval" in entry:
            low, high = entry["interval"]
            assert low <= entry["value"] + 1e-4 and entry["value"] - 1e-4 <= high
            assert 0 < entry["p_value"] <= 1


def test_two_models_have_scores_of_their_own(base, task):
    other = with_random_weights(base, 5)
    first, second = (score_retrieval(TextEncoder(m), [task], ["dense"]) for m in (base, other))
    key = ("tiny", "dense")
    assert first[key].by_query != second[key].by_query


def test_without_a_baseline(base, task):
    entries = evaluate_retrieval(base, None, [task], ["dense"])
    assert {(e["baseline"], e["retention"], e["retention_above_floor"]) for e in entries} == {
        (None, None, None)
    }


def test_a_mode_without_its_head_is_refused(base, task):
    from dataclasses import replace

    from bge_pruning.models.embedding_heads import EmbeddingHeads

    dense = replace(base, heads=EmbeddingHeads(32, "cls", sparse=False, colbert_dim=0))
    with pytest.raises(ValueError, match="mode sparse needs sparse vectors, and .* has no head"):
        evaluate_retrieval(dense, None, [task], ["dense", "sparse"])


# Floors


def test_random_weights_are_new_and_leave_the_model_alone(base):
    before = {k: v.clone() for k, v in base.backbone.state_dict().items()}
    state = torch.random.get_rng_state()
    other, same = with_random_weights(base, 3), with_random_weights(base, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in base.backbone.state_dict().items():
        assert torch.equal(value, before[name])
        new = other.backbone.state_dict()[name]
        assert torch.equal(new, same.backbone.state_dict()[name])
        if name.endswith("dense.weight"):
            assert float(new.std()) == pytest.approx(0.02, rel=0.2)
        elif name.endswith("bias"):
            assert not new.any()
        elif "LayerNorm" in name:
            assert (new == 1).all()


def test_word_embeddings_are_a_plain_mean(base):
    encoder = TextEncoder(base)
    table = base.backbone.embeddings.word_embeddings.weight.detach().numpy()
    texts = ["the man plays", "a dog", "zzzz"]
    found = WordEmbeddings(encoder).encode(texts).dense_vecs
    for row, text in enumerate(texts):
        ids = [i for i in encoder.tokenize([text])[0] if i not in encoder.special_ids]
        mean = table[ids].mean(axis=0) if ids else np.zeros(32)
        expected = mean / np.linalg.norm(mean) if ids else mean
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
