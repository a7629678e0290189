"""Similarity of sentence pairs with any of the outputs, in mteb's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_pruning.evaluation.multi_vector import encode_queries, score_pairs
from bge_pruning.evaluation.search import MODES, keeps_multi_vectors, task_prompt
from bge_pruning.evaluation.text_encoder import Encoder
from bge_pruning.models.embedding_heads import ENSEMBLE_WEIGHTS, OUTPUT_NAMES

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.types import PromptType


# What mteb calls the roles of the sentences of an asymmetric task; elsewhere they have none.
ROLES = {"query": "query", "document": "passage", None: "text"}


def side_prompt(encoder: Encoder, prompt_type: PromptType | None, metadata: TaskMetadata) -> str:
    """The prompt of the first or of the second sentences of a task of mteb."""
    return task_prompt(encoder, ROLES[prompt_type and prompt_type.value], metadata)


class PairCache:
    """Embeds the sentences of a task, each different one once, for all modes.

    Args:
        prompts: Written before each of the first sentences, and of the second ones.
    """

    def __init__(
        self,
        encoder: Encoder,
        first: Sequence[str],
        second: Sequence[str],
        outputs: Sequence[str],
        progress: bool = False,
        prompts: tuple[str, str] = ("", ""),
    ) -> None:
        self.encoder, self.progress = encoder, progress
        sides = [
            [prompt + t for t in part]
            for prompt, part in zip(prompts, (first, second), strict=True)
        ]
        self.texts = list(dict.fromkeys(text for side in sides for text in side))
        self.row = {text: index for index, text in enumerate(self.texts)}
        self.pairs = tuple(np.array([self.row[text] for text in side]) for side in sides)
        names = {OUTPUT_NAMES[output] for output in outputs} | {"dense_vecs"}
        if "colbert" in outputs and not keeps_multi_vectors(encoder, len(self.texts)):
            names -= {"colbert_vecs"}
        self.encoded = encoder.encode(self.texts, sorted(names), progress)
        self.truncated = self.encoded.truncated
        self._scores: dict[str, np.ndarray] = {}

    def scores(self, mode: str) -> np.ndarray:
        """Similarity of every pair, shape ``(pairs,)``."""
        parts = [ENSEMBLE_WEIGHTS[output] * self._output(output) for output in MODES[mode]]
        return np.sum(parts, axis=0)

    def _output(self, output: str) -> np.ndarray:
        if output not in self._scores:
            self._scores[output] = self._compute(output)
        return self._scores[output]

    def _compute(self, output: str) -> np.ndarray:
        first, second = self.pairs
        if output == "dense":
            vectors = self.encoded.dense_vecs.astype(np.float64)
            return (vectors[first] * vectors[second]).sum(axis=1)
        if output == "sparse":
            weights = self.encoded.lexical_weights
            return np.asarray(weights[first].multiply(weights[second]).sum(axis=1)).ravel()
        ready = self.encoded.multi_vectors
        queries = ready or encode_queries(self.encoder, self.texts)
        return score_pairs(self.encoder, queries, self.texts, self.pairs, self.progress, ready)


class SimilarityModel:
    """A model that compares sentences with one mode; implements mteb's ``EncoderProtocol``.

    mteb requests the vectors of all first sentences, then of all second ones, and then their
    similarities; those are computed with the mode.
    """

    def __init__(self, cache: PairCache, mode: str, meta: ModelMeta) -> None:
        self.cache = cache
        self.mode = mode
        self.mteb_model_meta = meta

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """Dense vectors of the sentences, shape ``(n, H)``."""
        prompt = side_prompt(self.cache.encoder, prompt_type, task_metadata)
        texts = [prompt + text for batch in inputs for text in batch["text"]]
        return self.cache.encoded.dense_vecs[[self.cache.row[text] for text in texts]]

    def similarity_pairwise(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Similarity of every pair with the mode, shape ``(pairs,)``."""
        return self.cache.scores(self.mode)

    def similarity(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Cosine similarity of every first with every second sentence; part of the protocol."""
        return first @ second.T
