"""Queries of a new model in the index of an old one."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from bge_pruning.evaluation.encoders import load_encoder
from bge_pruning.evaluation.index_compatibility import compare_index
from bge_pruning.evaluation.text_encoder import Encoded
from bge_pruning.model_io.projection import compute_selection

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_index_compatibility.py"


class Table:
    def __init__(self, vectors: np.ndarray, texts: list[str]):
        self.prompts = {}
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.rows = dict(zip(texts, vectors, strict=True))

    def encode(self, texts, progress=False):
        return Encoded(np.array([self.rows[text] for text in texts]), None)


TEXTS = [f"text {n}" for n in range(300)]
VECTORS = np.random.default_rng(0).normal(size=(300, 8))


def test_the_same_model_agrees_with_itself():
    old = Table(VECTORS, TEXTS)
    found = compare_index(old, old, TEXTS, TEXTS[::7])
    assert (found["agreement"], found["same_first"]) == (1.0, 1.0)
    assert found["cosine"]["mean"] == pytest.approx(1.0)
    assert (found["passages"], found["queries"], found["chance"]) == (300, 43, 10 / 300)


def test_each_model_writes_its_own_prompts_before_a_text():
    old, new = Table(VECTORS, TEXTS), Table(VECTORS, TEXTS)
    old.prompts = {"prompts": {"query": "q: ", "passage": "p: "}}
    old.rows = {f"{p}: {text}": row for p in "pq" for text, row in old.rows.items()}
    new.prompts = {"prompts": {"document": "not of queries: "}, "given": {"query": "find: "}}
    new.rows = {f"find: {text}": row for text, row in new.rows.items()}
    assert compare_index(old, new, TEXTS, TEXTS[::7])["agreement"] == 1.0


def test_agreement_is_counted_by_hand():
    old = Table(VECTORS, TEXTS)
    new = Table(VECTORS + np.random.default_rng(1).normal(0, 0.5, VECTORS.shape), TEXTS)
    queries = TEXTS[:40]
    found = compare_index(old, new, [*TEXTS, *queries], queries, top_k=5)  # a text counts once
    index = old.encode(TEXTS).dense_vecs
    shared, first, cosines = [], [], []
    for number, query in enumerate(queries):
        ranked = []
        for model in (old, new):
            scores = index @ model.rows[query]
            scores[number] = -2  # itself
            ranked.append(list(np.argsort(-scores)[:5]))
        shared.append(len(set(ranked[0]) & set(ranked[1])) / 5)
        first.append(ranked[0][0] == ranked[1][0])
        cosines.append(old.rows[query] @ new.rows[query])
    means = [found["agreement"], found["same_first"], found["cosine"]["mean"]]
    assert means == pytest.approx([np.mean(values) for values in (shared, first, cosines)])
    low, high = found["agreement_interval"]
    assert low < found["agreement"] < high
    assert 0.1 < found["agreement"] < 0.9


def test_other_dimensions_and_too_few_texts_are_refused():
    table = Table(VECTORS, TEXTS)
    message = "vectors have 4 dimensions and the index has 8. To fix, export it with --keep-dim"
    with pytest.raises(ValueError, match=message):
        compare_index(table, Table(VECTORS[:, :4], TEXTS), TEXTS, TEXTS)
    with pytest.raises(ValueError, match="10 passages and 3 queries are too few to compare the b"):
        compare_index(table, table, TEXTS[:10], TEXTS[:3])


def test_a_projected_model_in_the_index_of_a_larger_one(tmp_path, model_folder, write_projected):
    """The dimensions of the larger one: kept ones in their places, so that all agrees."""
    large = write_projected(tmp_path / "large", compute_selection(range(32), 40))
    plain, kept = load_encoder(str(model_folder)), load_encoder(str(large))
    texts = ["the man plays", "a dog", "the red book", "a cat sings", "the woman reads"]
    found = compare_index(kept, kept, texts, texts[:2], top_k=2)
    assert found["agreement"] == 1.0
    with pytest.raises(ValueError, match="vectors have 32 dimensions and the index has 40"):
        compare_index(kept, plain, texts, texts[:2], top_k=2)


def test_the_script(model_folder, small_folder, sts_csv, tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    output = tmp_path / "result.json"
    arguments = [str(model_folder), str(small_folder), "--texts", str(sts_csv), "--device", "cpu"]
    assert main([*arguments, "--limit", "50", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert (result["passages"], result["queries"]) == (50, 5)
    assert 0 <= result["agreement"] <= 1
    assert "of 5 queries" in capsys.readouterr().out
    assert main([*arguments, "--output", str(output)]) == 1
    assert "exists. To fix" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--limit", "0"])
