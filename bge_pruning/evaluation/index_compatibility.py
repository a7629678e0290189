"""Measures whether an index of one model's vectors still works with another model's queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bge_pruning.evaluation.search import top_columns
from bge_pruning.evaluation.statistics import bootstrap_interval
from bge_pruning.evaluation.text_encoder import Encoder
from bge_pruning.model_io.model_files import find_prompt
from bge_pruning.utils.records import IndexRecord

# Queries whose products with all passages are in memory at once.
BLOCK = 256


def compare_index(
    old: Encoder,
    new: Encoder,
    passages: Sequence[str],
    queries: Sequence[str],
    top_k: int = 10,
    progress: bool = False,
) -> dict[str, Any]:
    """Search an index of the old model with queries of the old and of the new one.

    Args:
        queries: Texts to search with, each model with its own prompts; a query that is itself a
            passage does not find itself.
        top_k: Passages of a query that are compared.

    Returns:
        ``agreement``, the mean share of the old model's ``top_k`` passages that the new model
        finds too, with its 95 % ``agreement_interval``; ``same_first``, the share of queries with
        the same best passage; ``chance``, the agreement of a random search; and ``cosine``, mean
        and fifth percentile of the cosine of both models' vectors of a query.

    Raises:
        ValueError: If the vectors differ in their dimensions, or there are too few passages.
    """
    passages = list(dict.fromkeys(passages))  # a query would find its own twin
    if len(passages) <= top_k or not queries:
        raise ValueError(
            f"{len(passages)} passages and {len(queries)} queries are too few to compare the best "
            f"{top_k}. To fix, give more texts."
        )
    index = _embed(old, "passage", passages, progress)
    before, after = (_embed(model, "query", queries, progress) for model in (old, new))
    if before.shape[1] != after.shape[1]:
        raise ValueError(
            f"the new model's vectors have {after.shape[1]} dimensions and the index has "
            f"{before.shape[1]}. To fix, export it with --keep-dimension, or give models whose "
            f"vectors have the same dimensions."
        )
    place = {text: number for number, text in enumerate(passages)}
    own = np.array([place.get(text, -1) for text in queries])
    first, second = (_best(vectors, index, own, top_k) for vectors in (before, after))
    shared = [len(set(a) & set(b)) / top_k for a, b in zip(first, second, strict=True)]
    cosines = (before * after).sum(axis=1)
    return {
        "passages": len(passages),
        "queries": len(queries),
        "top_k": top_k,
        "agreement": float(np.mean(shared)),
        "agreement_interval": list(bootstrap_interval(shared)),
        "same_first": float(np.mean(first[:, 0] == second[:, 0])),
        "chance": top_k / len(passages),
        "cosine": {"mean": float(cosines.mean()), "p5": float(np.percentile(cosines, 5))},
    }


def _embed(model: Encoder, role: str, texts: Sequence[str], progress: bool) -> np.ndarray:
    """Dense vectors of texts after the model's prompt for them, shape ``(n, S)``."""
    prompt = find_prompt(model.prompts, role)
    return model.encode([prompt + text for text in texts], progress=progress).dense_vecs


def describe_compatibility(index: IndexRecord) -> list[str]:
    """Describe in two lines how well a new model searches an old one's index."""
    low, high = index.agreement_interval
    return [
        f"Of the {index.top_k} best passages of a query the new model finds {index.agreement:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}; chance {index.chance:.1%}) in the old model's "
        f"index of {index.passages:,} passages; the best one is the same for "
        f"{index.same_first:.1%} of {index.queries:,} queries.",
        f"Cosine of the two models' vectors of a query: {index.cosine.mean:.4f} on average, above "
        f"{index.cosine.p5:.4f} for 95 %.",
    ]


def _best(queries: np.ndarray, index: np.ndarray, own: np.ndarray, top_k: int) -> np.ndarray:
    """The best passages of each query, best first, its own text left out: shape ``(q, top_k)``."""
    found = []
    for start in range(0, len(queries), BLOCK):
        scores = queries[start : start + BLOCK] @ index.T
        mine = own[start : start + BLOCK]
        rows = np.flatnonzero(mine >= 0)
        scores[rows, mine[rows]] = -np.inf
        found.append(top_columns(scores, top_k))
    return np.concatenate(found)
