"""Tokenised texts, examples over them, and batches of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Tensors by name, and the name of the source.
Batch = dict[str, "Tensor | str | list[list[int]]"]


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of many texts in one array.

    Attributes:
        ids: All token ids, shape ``(total,)``, int32.
        starts: Start of each text in ``ids``, and the end of the last; shape ``(texts + 1,)``.
        truncated: Number of texts that were longer than the limit.
    """

    ids: np.ndarray
    starts: np.ndarray
    truncated: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, special tokens included."""
        return np.diff(self.starts)


def build_tokenizer(tokenizer_json: bytes, max_length: int) -> Tokenizer:
    """A tokenizer that truncates and does not pad.

    Raises:
        ValueError: If ``max_length`` leaves no room for text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    special = tokenizer.num_special_tokens_to_add(False)
    if max_length <= special:
        raise ValueError(
            f"max_length {max_length} leaves no room for text beside {special} special tokens. To "
            f"fix, set max_length to {special + 1} or more."
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> TokenizedTexts:
    """Tokenise texts."""
    encodings = tokenizer.encode_batch_fast(list(texts))
    lengths = [len(encoding.ids) for encoding in encodings]
    ids = np.fromiter((i for e in encodings for i in e.ids), dtype=np.int32, count=sum(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return TokenizedTexts(ids, starts, sum(bool(e.overflowing) for e in encodings))


def replace_tokens(
    texts: TokenizedTexts, share: float, candidates: np.ndarray, seed: int, first: int = 0
) -> TokenizedTexts:
    """Texts some of whose tokens are others, drawn at random from the whole vocabulary.

    What a student is taught on few texts it knows on texts like them. Beside words that they do not
    have, it meets the rest of its vocabulary (TinyBERT, arXiv:1909.10351, replaces words by a
    language model; to ask the teacher about any words at all needs none). Each text has a share of
    its own, drawn from 0 to ``share``. Ids that are no candidates, such as special tokens, are
    neither drawn nor replaced; nor are the ``first`` tokens of a text, its prompt.
    """
    random = np.random.default_rng(seed)
    shares = np.repeat(random.uniform(0.0, share, len(texts)), texts.lengths)
    replaced = (random.random(len(texts.ids)) < shares) & np.isin(texts.ids, candidates)
    if first:
        place = np.arange(len(texts.ids)) - np.repeat(texts.starts[:-1], texts.lengths)
        replaced &= place >= first
    drawn = random.choice(candidates, len(texts.ids)).astype(texts.ids.dtype)
    return replace(texts, ids=np.where(replaced, drawn, texts.ids))


def perturb_texts(
    texts: TokenizedTexts, numbers: np.ndarray, first: int, random: np.random.Generator
) -> tuple[TokenizedTexts, np.ndarray]:
    """Add altered copies of some texts: a span is deleted, or swapped with the one that follows.

    A span has up to half of the tokens. Without the ``first`` ones, a prompt and what begins a
    text, and the last one, which ends it, a text has two tokens or more, or it is not altered.

    Returns:
        The texts with the copies, and the numbers of these, -1 of those that are not altered.
    """
    sizes = texts.lengths[numbers] - first - 1
    added = np.full(len(numbers), -1, np.int64)
    added[sizes >= 2] = len(texts) + np.arange((sizes >= 2).sum())
    starts, ends = (texts.starts[numbers[sizes >= 2] + end] for end in (0, 1))
    sizes = sizes[sizes >= 2]
    cut, follow, place = (random.random(len(sizes)) for _ in range(3))
    spans = 1 + (cut * (sizes // 2)).astype(np.int64)
    nexts = 1 + (follow * (sizes - spans)).astype(np.int64)
    begins = starts + first + (place * (sizes - spans - nexts + 1)).astype(np.int64)
    middles, lasts = begins + spans, begins + spans + nexts
    # A span that begins as the next one might read alike after it.
    is_swapped = (random.random(len(sizes)) < 0.5) & (texts.ids[begins] != texts.ids[middles])
    pieces = [(starts, begins), (middles, lasts), (begins, middles), (lasts, ends)]
    origins = np.stack([origin for origin, _ in pieces], axis=1)
    counts = np.stack([end - origin for origin, end in pieces], axis=1)
    counts[~is_swapped, 2] = 0
    places = np.repeat((origins - _exclusive_sum(counts)).ravel(), counts.ravel())
    copies = texts.ids[places + np.arange(len(places))]
    ends = texts.starts[-1] + np.cumsum(counts.sum(axis=1))
    both = np.concatenate([texts.ids, copies]), np.concatenate([texts.starts, ends])
    return TokenizedTexts(*both, texts.truncated), added


def _exclusive_sum(counts: np.ndarray) -> np.ndarray:
    """Sum of all numbers before each one, row by row."""
    return (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)


def pad_texts(texts: Sequence[np.ndarray], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad texts to the longest: ``input_ids`` and ``attention_mask``, int64, shape ``(texts, T)``.

    The mask comes from the lengths, not from the ids: a text may spell out the padding token.
    """
    longest = max(len(ids) for ids in texts)
    input_ids = np.full((len(texts), longest), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, ids in enumerate(texts):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(mask)


class Targets(Protocol):
    """The teacher's outputs, see :class:`bge_pruning.datasets.teacher_vectors.TeacherCache`."""

    def items(self, example: np.ndarray) -> dict[str, object]:
        """Outputs of an example's texts, as :class:`Collator` reads them."""


class EmbeddingDataset(Dataset):
    """Examples of N texts each, with what is known about them.

    Args:
        examples: Text indices, shape ``(n, N)``.
        scores: Gold scores in [0, 1], shape ``(n,)``, or ``None``.
        teacher: The teacher's outputs of the texts that are drawn.
    """

    def __init__(
        self,
        texts: TokenizedTexts,
        examples: np.ndarray,
        scores: np.ndarray | None = None,
        teacher: Targets | None = None,
    ) -> None:
        self.texts = texts
        self.examples = examples
        self.scores = scores
        self.teacher = teacher

    def __len__(self) -> int:
        return len(self.examples)

    def texts_of(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of the texts of examples, one example after the other."""
        return self.examples[indices % len(self)].ravel()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longest text of each example, shape ``(n,)``."""
        return self.texts.lengths[self.examples].max(axis=1)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of all texts of each example, shape ``(n,)``."""
        return self.texts.lengths[self.examples].sum(axis=1)

    @property
    def width(self) -> int:
        """Texts of an example."""
        return self.examples.shape[1]

    def __getitem__(self, index: int) -> dict[str, object]:
        """The example of an index, which may also be raised by the length times an epoch."""
        index %= len(self)
        example = self.examples[index]
        item: dict[str, object] = {"ids": [self.texts[i] for i in example]}
        if self.scores is not None:
            item["score"] = self.scores[index]
        return item if self.teacher is None else {**item, **self.teacher.items(example)}


class Collator:
    """Pads examples to the longest text of the batch."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, object]]) -> Batch:
        """A batch as :class:`ComposerBGEM3` reads it: ``input_ids`` of shape ``(B, N, T)``, ..."""
        texts = len(items[0]["ids"])
        rows = pad_texts([ids for item in items for ids in item["ids"]], self.pad_token_id)
        names = ("input_ids", "attention_mask")
        batch = {
            name: value.unflatten(0, (len(items), texts))
            for name, value in zip(names, rows, strict=True)
        }
        batch["lengths"] = [[len(ids) for ids in item["ids"]] for item in items]
        if "source" in items[0]:
            batch["source"] = items[0]["source"]
        if "score" in items[0]:
            batch["scores"] = torch.tensor([float(item["score"]) for item in items])
        stacked = ("passage_texts", "passage_scores", "own_passages_only", "teacher_dense_vecs")
        for name in stacked:
            if name in items[0]:
                batch[name] = torch.from_numpy(np.stack([item[name] for item in items]))
        if "positive_texts" in items[0]:
            # A text is never -1, so the padding of the shorter lists equals no passage.
            positives = [torch.from_numpy(item["positive_texts"]) for item in items]
            batch["positive_texts"] = pad_sequence(positives, batch_first=True, padding_value=-1)
        for name in ("teacher_token_weights", "teacher_colbert_vecs", "teacher_last_states"):
            if name in items[0]:
                tokens = _pad_tokens([row for item in items for row in item[name]])
                batch[name] = tokens.unflatten(0, (len(items), texts))
        if "teacher_colbert_vecs" in batch:
            # Kept with a row for CLS on disk, as the ids are; the head gives none.
            batch["teacher_colbert_vecs"] = batch["teacher_colbert_vecs"][:, :, 1:]
        return batch


def _pad_tokens(rows: Sequence[np.ndarray]) -> Tensor:
    """Values of the tokens of each text, padded with 0: shape ``(texts, T, ...)``, float32."""
    longest = max(len(row) for row in rows)
    padded = np.zeros((len(rows), longest, *rows[0].shape[1:]), np.float32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)
