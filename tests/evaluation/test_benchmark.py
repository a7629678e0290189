"""Comparisons with other tools: the same results, and ratios of what was measured."""

import pytest

from bge_pruning.evaluation.benchmark import (
    Comparison,
    compare_encoding,
    compare_multi_vectors,
    compare_pair_scores,
    render_comparison,
    search_large_corpus,
)
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.models.pretrained import load_base_model

TEXTS = ["the man plays the guitar", "a dog", "the woman reads a red book", "a"]


@pytest.fixture(scope="module")
def encoder(model_folder) -> TextEncoder:
    return TextEncoder(load_base_model(str(model_folder)), batch_size=2)


def test_both_tools_embed_alike(encoder, model_folder):
    found = compare_encoding(str(model_folder), encoder, TEXTS, rounds=2)
    assert found.difference < 1e-5
    assert len(found.ours) == len(found.theirs) == 2
    assert min(*found.ours, *found.theirs) > 0


def test_both_tools_score_alike(encoder):
    found = compare_multi_vectors(encoder, TEXTS[:3], TEXTS, rounds=1)
    assert found.difference < 1e-5
    assert found.what == "multi-vector scores of 12 pairs"


def test_both_tools_score_pairs_of_texts_alike(encoder, model_folder):
    found = compare_pair_scores(str(model_folder), encoder, TEXTS[:2], TEXTS, rounds=1)
    assert found.difference < 1e-5
    assert found.what == "multi-vector scores of 8 pairs of texts"


def test_a_large_corpus_is_made_of_a_small_one(encoder):
    found = search_large_corpus(encoder, TEXTS[:2], TEXTS, 300)
    assert found.passages == 300
    assert found.seconds > 0
    assert found.bytes >= 0


def test_the_ratio_is_the_median_of_the_rounds():
    comparison = Comparison("it", [1.0, 2.0, 4.0], [3.0, 4.0, 40.0], 1e-7)
    assert comparison.ratio == 3.0
    assert render_comparison(comparison, "theirs") == (
        "it: 2.000 s, theirs 4.000 s; 3.00 times as fast (2.00 to 10.00 over 3 rounds); "
        "largest difference 1.0e-07"
    )
