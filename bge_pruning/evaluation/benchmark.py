"""Speed of evaluation beside the usual tools, on the same model, texts and machine."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
from torch import Tensor

from bge_pruning.evaluation.multi_vector import (
    MultiVectors,
    encode_queries,
    score_pairs,
    score_passage,
)
from bge_pruning.evaluation.search import MODES, CorpusCache, SearchModel
from bge_pruning.evaluation.text_encoder import TextEncoder


@dataclass(frozen=True)
class Comparison:
    """Seconds of each round of two ways to do the same.

    Attributes:
        what: What was done.
        ours: Seconds of every round.
        theirs: Same, of the other tool.
        difference: Largest difference of the two results.
    """

    what: str
    ours: list[float]
    theirs: list[float]
    difference: float

    @property
    def ratio(self) -> float:
        """How many times as fast ours is: the median over the rounds."""
        return float(np.median(np.divide(self.theirs, self.ours)))


def compare_encoding(
    model: str, encoder: TextEncoder, texts: Sequence[str], rounds: int
) -> Comparison:
    """Dense vectors, beside sentence-transformers.

    Args:
        model: Folder of the model, in the sentence-transformers layout.
        encoder: The same model.
        texts: Texts to embed.
        rounds: How often; the two take turns.
    """
    from sentence_transformers import SentenceTransformer

    other = SentenceTransformer(model, device=encoder.device)
    other.max_seq_length = encoder.max_length

    def ours() -> np.ndarray:
        return encoder.encode(texts).dense_vecs

    def theirs() -> np.ndarray:
        return other.encode(list(texts), batch_size=encoder.batch_size, show_progress_bar=False)

    return _compare(f"embedding {len(texts)} texts", ours, theirs, rounds)


def compare_multi_vectors(
    encoder: TextEncoder, queries: Sequence[str], passages: Sequence[str], rounds: int
) -> Comparison:
    """Multi-vector scores of all pairs, beside FlagEmbedding's score of one pair at a time.

    Args:
        encoder: A model with multi-vectors.
        queries: Queries.
        passages: Passages.
        rounds: How often; the two take turns.
    """
    from FlagEmbedding import BGEM3FlagModel

    ours_q = encode_queries(encoder, queries)
    ours_p = encode_queries(encoder, passages)
    everything = np.arange(len(queries))

    def texts(part: MultiVectors) -> list[Tensor]:
        return [part.vectors[a:b] for a, b in pairwise(part.starts.tolist())]

    blocks, theirs_q = texts(ours_p), [block.cpu().numpy() for block in texts(ours_q)]
    theirs_p = [block.cpu().numpy() for block in blocks]

    def ours() -> np.ndarray:
        return np.stack([score_passage(ours_q, everything, block) for block in blocks], axis=1)

    def theirs() -> np.ndarray:
        score = BGEM3FlagModel.colbert_score
        return np.array([[float(score(None, q, p)) for p in theirs_p] for q in theirs_q])

    pairs = len(queries) * len(passages)
    return _compare(f"multi-vector scores of {pairs} pairs", ours, theirs, rounds)


def compare_pair_scores(
    model: str, encoder: TextEncoder, queries: Sequence[str], passages: Sequence[str], rounds: int
) -> Comparison:
    """Multi-vector scores from texts, beside FlagEmbedding's call for pairs of texts.

    That call embeds both texts of every pair; here each text is embedded once.

    Args:
        model: Folder of the model.
        encoder: The same model.
        queries: Queries.
        passages: Passages; every query is scored with each of them.
        rounds: How often; the two take turns.
    """
    from FlagEmbedding import BGEM3FlagModel

    other = BGEM3FlagModel(model, use_fp16=False, devices=encoder.device)
    pairs = [(query, passage) for query in queries for passage in passages]
    where = np.divmod(np.arange(len(pairs)), len(passages))

    def ours() -> np.ndarray:
        return score_pairs(encoder, encode_queries(encoder, queries), passages, where)

    def theirs() -> np.ndarray:
        with _quiet():  # it shows a progress bar
            scores = other.compute_score(
                pairs,
                batch_size=encoder.batch_size,
                max_query_length=encoder.max_length,
                max_passage_length=encoder.max_length,
            )
        return np.array(scores["colbert"])

    return _compare(f"multi-vector scores of {len(pairs)} pairs of texts", ours, theirs, rounds)


@dataclass(frozen=True)
class LargeSearch:
    """What a search of a large corpus took.

    Attributes:
        passages: Passages of the corpus.
        seconds: Embedding, searching and comparing multi-vectors.
        bytes: How much the largest memory of the process grew.
    """

    passages: int
    seconds: float
    bytes: int


def search_large_corpus(
    encoder: TextEncoder, queries: Sequence[str], passages: Sequence[str], count: int
) -> LargeSearch:
    """Search a corpus in mode ``all``.

    Args:
        encoder: A model with all outputs.
        queries: Queries.
        passages: Passages; repeated, each with a number, until there are ``count``.
        count: Size of the corpus.
    """
    corpus = [
        {"id": str(i), "title": str(i), "text": passages[i % len(passages)]} for i in range(count)
    ]
    before, started = _peak_bytes(), time.perf_counter()
    model = SearchModel(CorpusCache(encoder, MODES["all"]), "all", None)
    name = SimpleNamespace(name="large")
    model.index(corpus, task_metadata=name, hf_split="test", hf_subset="default")
    rows = [{"id": str(i), "text": text} for i, text in enumerate(queries)]
    model.search(rows, top_k=100)
    return LargeSearch(count, time.perf_counter() - started, _peak_bytes() - before)


def _peak_bytes() -> int:
    # In KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def _compare(
    what: str, ours: Callable[[], np.ndarray], theirs: Callable[[], np.ndarray], rounds: int
) -> Comparison:
    difference = float(np.abs(ours() - theirs()).max())  # and both are warm
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, spent in zip((ours, theirs), seconds, strict=True):
            started = time.perf_counter()
            run()
            spent.append(time.perf_counter() - started)
    return Comparison(what, *seconds, difference)


def render_comparison(comparison: Comparison, other: str) -> str:
    """A line for a person: medians, ratio with its range, and the difference of the results."""
    ratios = np.divide(comparison.theirs, comparison.ours)
    return (
        f"{comparison.what}: {np.median(comparison.ours):.3f} s, {other} "
        f"{np.median(comparison.theirs):.3f} s; {comparison.ratio:.2f} times as fast "
        f"({ratios.min():.2f} to {ratios.max():.2f} over {len(ratios)} rounds); "
        f"largest difference {comparison.difference:.1e}"
    )
