"""Retrieval with any of the outputs, in mteb's protocol: index a corpus, then search it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_pruning.config.names import MODES
from bge_pruning.datasets.mteb_dataloader import passage_text, query_text
from bge_pruning.evaluation.multi_vector import encode_queries, score_pairs
from bge_pruning.evaluation.text_encoder import Encoded, Encoder
from bge_pruning.model_io.model_files import find_prompt
from bge_pruning.models.embedding_heads import ENSEMBLE_WEIGHTS, OUTPUT_NAMES

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta

# Queries whose scores with the whole corpus are in memory at once.
QUERIES = 128
# Most bytes of multi-vectors that are kept, so that passages need not be embedded twice.
KEPT_BYTES = 2 << 30


def check_modes(modes: Sequence[str], names: Sequence[str], model: str) -> None:
    """Refuse modes that are unknown, or need a head that the model lacks."""
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode '{mode}' is not one of {', '.join(MODES)}. To fix, choose one.")
        missing = [output for output in MODES[mode] if OUTPUT_NAMES[output] not in names]
        if missing:
            possible = [
                m for m, outputs in MODES.items() if all(OUTPUT_NAMES[o] in names for o in outputs)
            ]
            raise ValueError(
                f"mode {mode} needs {' and '.join(missing)} vectors, and {model} has no head for "
                f"them. To fix, choose among {', '.join(possible)}, or use a model with that head."
            )


def keeps_multi_vectors(encoder: Encoder, texts: int) -> bool:
    """Whether the multi-vectors of all texts are kept, so that none is embedded twice.

    Of several processes each has only a part of the texts.
    """
    alone = encoder.ranks.count == 1
    return alone and encoder.multi_vector_bytes(texts) <= KEPT_BYTES


@dataclass
class Collection:
    """A corpus, embedded once for all modes, with its multi-vectors if they fit.

    Passages of one text share their vectors, so that their scores are equal to the last bit.

    Attributes:
        texts: Each different text once.
        ids: The passages of each text.
    """

    texts: list[str]
    ids: list[list[str]]
    encoded: Encoded


class CorpusCache:
    """Embeds each corpus once for all outputs, whatever the number of modes that search it."""

    def __init__(self, encoder: Encoder, outputs: Sequence[str], progress: bool = False) -> None:
        self.encoder = encoder
        wanted = {OUTPUT_NAMES[output] for output in outputs} - {"colbert_vecs"}
        if "colbert" in outputs:  # its candidates are found by the others
            wanted |= {"dense_vecs", "token_weights"} & set(encoder.names())
        self.names = tuple(sorted(wanted))
        self.late = "colbert" in outputs
        self.progress = progress
        self._collections: dict[object, Collection] = {}
        self._queries: tuple[tuple[str, ...], Encoded] | None = None
        self._late: tuple[object, np.ndarray] | None = None

    def collection(
        self, key: object, corpus: Sequence[Mapping[str, Any]], prompt: str = ""
    ) -> Collection:
        """A corpus, embedded when it is first asked for; an earlier one is dropped.

        The ``prompt`` is written before each passage.
        """
        if key not in self._collections:
            ids: dict[str, list[str]] = {}
            for row in corpus:
                text = prompt + passage_text(row, f"passage {row['id']}", empty=True)
                ids.setdefault(text, []).append(str(row["id"]))
            texts = list(ids)
            self._collections = {key: Collection(texts, [*ids.values()], self._encode(texts))}
        return self._collections[key]

    def queries(self, texts: Sequence[str]) -> Encoded:
        """Queries, embedded when they are first asked for; earlier ones are dropped."""
        key = tuple(texts)
        if self._queries is None or self._queries[0] != key:
            self._queries = (key, self._encode(texts))
        return self._queries[1]

    def _encode(self, texts: Sequence[str]) -> Encoded:
        late = self.late and keeps_multi_vectors(self.encoder, len(texts))
        names = (*self.names, "colbert_vecs") if late else self.names
        return self.encoder.encode(texts, names, self.progress)

    def late_scores(
        self, texts: Sequence[str], collection: Collection, indices: np.ndarray
    ) -> np.ndarray:
        """Multi-vector scores of queries with candidates, ``(q, k)``; kept for the next mode."""
        key = (tuple(texts), id(collection), indices.tobytes())
        if self._late is None or self._late[0] != key:
            pairs = (np.repeat(np.arange(len(texts)), indices.shape[1]), indices.ravel())
            queries = self.queries(texts).multi_vectors or encode_queries(self.encoder, texts)
            ready = collection.encoded.multi_vectors
            late = score_pairs(self.encoder, queries, collection.texts, pairs, self.progress, ready)
            self._late = (key, late.reshape(indices.shape))
        return self._late[1]


class SearchModel:
    """A model that searches with one mode; implements mteb's ``SearchProtocol``.

    Multi-vectors are compared for the ``candidates`` best passages of each query by the dense and
    sparse vectors together; the others are not among the results.

    Attributes:
        texts: Passages and queries of the last search.
        truncated: How many of them were truncated.
    """

    def __init__(
        self, corpora: CorpusCache, mode: str, meta: ModelMeta, candidates: int = 200
    ) -> None:
        self.texts = self.truncated = 0
        self.corpora = corpora
        self.mode = mode
        self.mteb_model_meta = meta
        self.candidates = candidates
        self._collection: Collection | None = None

    def index(
        self, corpus: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **kwargs: Any
    ) -> None:
        """Embed the corpus, unless another mode has done so."""
        key = (task_metadata.name, hf_subset, hf_split)
        prompt = task_prompt(self.corpora.encoder, "passage", task_metadata)
        self._collection = self.corpora.collection(key, corpus, prompt)

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Any = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """Find the best passages of each query, with their scores.

        Without dense vectors, a passage of score 0 has nothing in common with the query and is not
        found: a dead head finds nothing.
        """
        if top_ranked is not None:
            raise ValueError(
                "a reranking task lists the passages of each query, which is not supported. To "
                "fix, choose a retrieval task."
            )
        names = [str(row["id"]) for row in queries]
        prompt = task_prompt(self.corpora.encoder, "query", task_metadata)
        texts = [prompt + query_text(row, f"query {row['id']}") for row in queries]
        encoded = self.corpora.queries(texts)
        self.texts = len(texts) + len(self._collection.texts)
        self.truncated = encoded.truncated + self._collection.encoded.truncated
        outputs = MODES[self.mode]
        if "colbert" in outputs:
            ranked = self._rerank(texts, encoded, outputs, top_k)
        else:
            ranked = first_stage(encoded, self._collection.encoded, outputs, top_k)
        ids, dense = self._collection.ids, "dense" in outputs
        return {
            name: {
                passage: float(s)
                for i, s in zip(*row, strict=True)
                if dense or s
                for passage in ids[i]
            }
            for name, row in zip(names, zip(*ranked, strict=True), strict=True)
        }

    def _rerank(
        self, texts: Sequence[str], encoded: Encoded, outputs: Sequence[str], top_k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        corpora, collection = self.corpora, self._collection
        first = [name for name in ("dense", "sparse") if OUTPUT_NAMES[name] in corpora.names]
        depth = min(self.candidates, len(collection.texts))
        indices, scores = first_stage(encoded, collection.encoded, first, depth)
        if outputs == ("colbert",):
            scores = np.zeros_like(scores)
        late = corpora.late_scores(texts, collection, indices)
        scores = scores + ENSEMBLE_WEIGHTS["colbert"] * late
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        return np.take_along_axis(indices, order, 1), np.take_along_axis(scores, order, 1)


def task_prompt(encoder: Encoder, role: str, metadata: TaskMetadata) -> str:
    """The prompt of a text of a task, as mteb finds it; for roles see :func:`find_prompt`."""
    return find_prompt(encoder.prompts, role, (metadata.name, metadata.type))


def first_stage(
    queries: Encoded, passages: Encoded, outputs: Sequence[str], top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the best passages of every query by dense or sparse vectors.

    With both outputs their weighted scores are added. Returns indices and scores of the passages,
    best first, each of shape ``(q, min(top_k, p))``.
    """
    count = len(queries.dense_vecs) if "dense" in outputs else queries.lexical_weights.shape[0]
    indices, values = [], []
    for start in range(0, count, QUERIES):
        rows = slice(start, start + QUERIES)
        scores = sum(
            ENSEMBLE_WEIGHTS[name] * _scores(queries, passages, name, rows) for name in outputs
        )
        best = top_columns(scores, top_k)
        indices.append(best)
        values.append(np.take_along_axis(scores, best, 1))
    return np.concatenate(indices), np.concatenate(values)


def _scores(queries: Encoded, passages: Encoded, output: str, rows: slice) -> np.ndarray:
    if output == "dense":
        return queries.dense_vecs[rows] @ passages.dense_vecs.T
    return (queries.lexical_weights[rows] @ passages.lexical_weights.T).toarray()


def top_columns(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Columns of the highest scores of each row, best first."""
    count = min(top_k, scores.shape[1])
    if count < scores.shape[1]:
        best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    else:
        best = np.broadcast_to(np.arange(count), scores.shape)
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)
