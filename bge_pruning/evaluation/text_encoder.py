"""Encodes texts into the three outputs of a model, sorted by length to save padding."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor
from tqdm import tqdm

from bge_pruning.datasets.embedding_dataset import (
    TokenizedTexts,
    build_tokenizer,
    pad_texts,
    tokenize,
)
from bge_pruning.datasets.mixed_dataloader import BATCH_TOKENS, batch_indices
from bge_pruning.model_io.model_files import read_special_ids
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.model_io.projection import project
from bge_pruning.models.structural_pruning import PruningMasks
from bge_pruning.models.teacher import compute_outputs

T = TypeVar("T")


def _alone(part: T) -> list[T]:
    return [part]


@dataclass(frozen=True)
class Ranks:
    """Place of this process among those that evaluate together; by default it is the only one.

    All processes have to do the same with the same texts, in the same order.

    Attributes:
        gather: Collects an object of every process, in the order of their numbers, on all of them.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every ``count``-th item, to spread sorted lengths evenly."""
        return items[self.rank :: self.count]

    def order(self, total: int) -> np.ndarray:
        """Place of each of ``total`` items when the parts of all processes are concatenated."""
        parts = [np.arange(rank, total, self.count) for rank in range(self.count)]
        return np.argsort(np.concatenate(parts))


ALONE = Ranks()


log = logging.getLogger(__name__)

# Most seconds without a line in the log, where there is no progress bar.
QUIET = 30.0
# Texts that are tokenised together; only their token ids are kept.
CHUNK = 8192


@dataclass
class MultiVectors:
    """Multi-vectors of texts, one text after the other, without padding.

    Attributes:
        vectors: L2-normalised, shape ``(tokens, C)``; ``None`` before the first is filled in.
        starts: Start of each text in ``vectors``, and the end of the last; ``(n + 1,)``.
    """

    vectors: Tensor | None
    starts: np.ndarray

    @classmethod
    def room_for(cls, tokens: TokenizedTexts) -> MultiVectors:
        """Room for those of all tokens but CLS, to fill batch by batch."""
        return cls(None, tokens.starts - np.arange(len(tokens) + 1))

    def fill(self, index: np.ndarray, values: Tensor) -> None:
        """Put the vectors of some texts, shape ``(B, T - 1, C)``, where they belong."""
        if self.vectors is None:
            self.vectors = values.new_empty(int(self.starts[-1]), values.shape[-1])
        for row, text in enumerate(index):
            start, end = self.starts[text], self.starts[text + 1]
            self.vectors[start:end] = values[row, : end - start]


@dataclass(frozen=True)
class Encoded:
    """Outputs of texts that need little memory, in the order of the texts.

    Attributes:
        dense_vecs: L2-normalised, float32, shape ``(n, S)``; ``None`` if not requested.
        lexical_weights: Sparse vectors over the vocabulary, float32, shape ``(n, V)``, or ``None``.
        truncated: Number of texts that were truncated at the model's limit.
    """

    dense_vecs: np.ndarray | None
    lexical_weights: csr_matrix | None
    truncated: int = 0
    multi_vectors: MultiVectors | None = None


@dataclass(frozen=True)
class TextSide:
    """What an encoder needs to know about a model besides its weights.

    ``dense_size`` is ``S``, the size of a dense vector; ``H`` without a projection.
    """

    name: str
    tokenizer_files: Mapping[str, bytes]
    dense_size: int
    vocab_size: int
    pad_token_id: int
    max_seq_length: int
    prompts: Mapping[str, Any]


class Encoder(Protocol):
    """What evaluation needs of a model; :class:`TextEncoder` has all three outputs.

    Attributes:
        prompts: What to write before texts, as ``model_files.find_prompt`` takes it.
        special_ids: Ids of special tokens.
    """

    device: str
    batch_size: int
    max_length: int
    prompts: Mapping[str, Any]
    special_ids: Sequence[int]

    def names(self) -> tuple[str, ...]:
        """Outputs that the model has."""

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Token ids of texts."""

    def word_table(self) -> np.ndarray:
        """Word embeddings, shape ``(V, H)``."""

    def encode(
        self, texts: Sequence[str], names: Sequence[str] = ("dense_vecs",), progress: bool = False
    ) -> Encoded:
        """Dense and sparse vectors of texts."""


class BatchEncoder(ABC):
    """Encodes texts into outputs; subclasses compute a batch."""

    def __init__(
        self,
        side: TextSide,
        device: str,
        max_length: int | None,
        batch_size: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.name = side.name
        self.device = device
        self.batch_size = batch_size
        self.ranks = ranks
        self.dense_size = side.dense_size
        self.vocab_size = side.vocab_size
        self.pad_token_id = side.pad_token_id
        self.special_ids = sorted(read_special_ids(dict(side.tokenizer_files)))
        self.prompts = side.prompts
        self.max_length = min(max_length or side.max_seq_length, side.max_seq_length)
        self._tokenizer = build_tokenizer(side.tokenizer_files["tokenizer.json"], self.max_length)

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The outputs that the model has."""

    @abstractmethod
    def word_table(self) -> np.ndarray:
        """Word embeddings, shape ``(V, H)``."""

    @abstractmethod
    def compute(self, ids: Tensor, mask: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Outputs by name of a batch, whose ids and mask have the shape ``(B, T)``."""

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Token ids of texts."""
        parts = [
            tokenize(texts[start : start + CHUNK], self._tokenizer)
            for start in range(0, len(texts), CHUNK)
        ]
        lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
        ids = np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)])
        return TokenizedTexts(ids, np.cumsum(lengths), sum(part.truncated for part in parts))

    def encode(
        self, texts: Sequence[str], names: Sequence[str] = ("dense_vecs",), progress: bool = False
    ) -> Encoded:
        """Dense and sparse vectors of texts.

        Args:
            names: ``dense_vecs``, ``token_weights``; in one process also ``colbert_vecs``, if all
                of them fit in memory, see :meth:`multi_vector_bytes`.

        Raises:
            ValueError: If an output is not finite.
        """
        part = self._encode(self.ranks.share(texts), names, progress)
        if self.ranks.count == 1:
            return part
        return _merge(self.ranks.gather(part), self.ranks.order(len(texts)))

    def _encode(self, texts: Sequence[str], names: Sequence[str], progress: bool) -> Encoded:
        tokens = self.tokenize(texts)
        shape = (len(tokens), self.dense_size)
        dense = np.empty(shape, np.float32) if "dense_vecs" in names else None
        entries: list[tuple[np.ndarray, ...]] = []
        multi = MultiVectors.room_for(tokens) if "colbert_vecs" in names else None
        for index, ids, _, outputs in self.batches(tokens, names, progress):
            if dense is not None:
                dense[index] = outputs["dense_vecs"].float().cpu().numpy()
            if "token_weights" in names:
                text, token, weight = self._largest_weights(ids, outputs["token_weights"].float())
                entries.append((index[text], token, weight))
            if multi is not None:
                multi.fill(index, outputs["colbert_vecs"].float())
        sparse = self._sparse(entries, len(tokens)) if "token_weights" in names else None
        return Encoded(dense, sparse, tokens.truncated, multi)

    def multi_vector_bytes(self, texts: int) -> float:
        """Most memory that the multi-vectors of texts take; infinite if their size is unknown."""
        return float("inf")

    def _sparse(self, entries: list[tuple[np.ndarray, ...]], count: int) -> csr_matrix:
        """Sparse vectors of all texts from rows, columns and weights of each batch."""
        shape = (count, self.vocab_size)
        if not entries:
            return csr_matrix(shape, dtype=np.float32)
        rows, columns, weights = (np.concatenate(part) for part in zip(*entries, strict=True))
        return csr_matrix((weights, (rows, columns)), shape=shape)

    def _largest_weights(
        self, ids: Tensor, weights: Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Text, token and weight of every sparse vector's entries, special tokens left out."""
        special = torch.tensor(self.special_ids, device=ids.device)
        kept = (weights > 0) & ~torch.isin(ids, special)
        text, place = kept.nonzero(as_tuple=True)
        keys = text * self.vocab_size + ids[text, place]
        unique, inverse = torch.unique(keys, return_inverse=True)
        largest = weights.new_zeros(len(unique)).scatter_reduce(
            0, inverse, weights[text, place], "amax"
        )
        entries = unique.cpu().numpy()
        return entries // self.vocab_size, entries % self.vocab_size, largest.cpu().numpy()

    @torch.inference_mode()
    def batches(
        self, tokens: TokenizedTexts, names: Sequence[str], progress: bool = False
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor, dict[str, Tensor]]]:
        """Outputs batch by batch, the longest texts first.

        Yields which texts these are, ``(B,)``; their token ids and mask, ``(B, T)``; and the
        outputs on the device.
        """
        done, said = 0, time.monotonic()
        with tqdm(total=len(tokens), desc="embedding", unit="text", disable=not progress) as bar:
            for index in batch_indices(tokens.lengths, self.batch_size, BATCH_TOKENS):
                ids, mask = pad_texts([tokens[i] for i in index], self.pad_token_id)
                ids, mask = ids.to(self.device), mask.to(self.device)
                outputs = self.compute(ids, mask, names)
                check_finite(outputs, self.name)
                yield index, ids, mask, outputs
                bar.update(len(index))
                done += len(index)
                if not progress and time.monotonic() - said > QUIET:
                    log.info("embedded %d of %d texts", done, len(tokens))
                    said = time.monotonic()


class TextEncoder(BatchEncoder):
    """A model that embeds texts.

    Args:
        max_length: Longest text in tokens; ``None`` for the model's own limit.
        masks: Gates of a model that is not cut yet. Dense vectors keep their size and are 0 in
            closed dimensions; every score equals that of the extracted model.

    Raises:
        ValueError: If ``max_length`` leaves no room for text.
    """

    def __init__(
        self,
        base: BaseModel,
        device: str = "cpu",
        max_length: int | None = None,
        batch_size: int = 64,
        masks: PruningMasks | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        side = TextSide(
            base.name,
            base.tokenizer_files,
            base.dense_size(),
            base.shape.vocab_size,
            base.hf_config["pad_token_id"],
            base.max_seq_length,
            base.prompts,
        )
        super().__init__(side, device, max_length, batch_size, ranks)
        self.base = base
        self.backbone = base.backbone.to(device).eval()
        self.heads = base.heads.to(device).eval()
        self.projection = None if base.projection is None else base.projection.to(device)
        self.masks = masks
        self.half = False

    def names(self) -> tuple[str, ...]:
        """The outputs that the model has."""
        return self.heads.names()

    def multi_vector_bytes(self, texts: int) -> float:
        """See :class:`BatchEncoder`; for float32 vectors of texts of the largest length."""
        return 4.0 * texts * self.max_length * self.base.shape.colbert_dim

    def word_table(self) -> np.ndarray:
        """Word embeddings, shape ``(V, H)``."""
        table = self.backbone.embeddings.word_embeddings.weight
        return table.detach().float().cpu().numpy().copy()

    def compute(self, ids: Tensor, mask: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of one batch by name, see :class:`BatchEncoder`."""
        modules = self.backbone, self.heads
        outputs = compute_outputs(*modules, ids, mask, names, self.masks, half=self.half)
        if self.projection is not None and "dense_vecs" in outputs:
            outputs["dense_vecs"] = project(outputs["dense_vecs"], self.projection)
        return outputs


def _merge(parts: Sequence[Encoded], order: np.ndarray) -> Encoded:
    """Merge the texts of all processes in the order in which they were given."""
    dense, sparse = None, None
    if parts[0].dense_vecs is not None:
        dense = np.concatenate([part.dense_vecs for part in parts])[order]
    if parts[0].lexical_weights is not None:
        sparse = vstack([part.lexical_weights for part in parts], format="csr")[order]
    return Encoded(dense, sparse, sum(part.truncated for part in parts))


def check_finite(outputs: Mapping[str, Tensor], model: str) -> None:
    """Refuse outputs that are not finite: ranked as they come, they could score well."""
    broken = [name for name, value in outputs.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{', '.join(broken)} of {model} are not finite: its weights are broken. To fix, use "
            f"an earlier checkpoint, and lower optimizer.lr if it was trained here."
        )
