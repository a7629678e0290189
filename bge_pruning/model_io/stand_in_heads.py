"""Stand-ins for BGE-M3's sparse and multi-vector heads.

The multi-vector head is the identity; the sparse head is a ridge regression from hidden states to
inverse document frequency, so that rare words weigh more than common ones. Small BERT encoders are
easy to obtain: with such heads they are the small *trained* models of tests and examples.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from bge_pruning.datasets.embedding_dataset import build_tokenizer, pad_texts
from bge_pruning.model_io.example_models import HEADS
from bge_pruning.model_io.model_files import (
    read_hf_config,
    read_max_seq_length,
    read_special_ids,
    read_tokenizer_files,
)

logger = logging.getLogger(__name__)


def compute_identity_head(hidden_size: int) -> dict[str, Tensor]:
    """Content of a ``colbert_linear.pt`` that returns its input."""
    return {"weight": torch.eye(hidden_size), "bias": torch.zeros(hidden_size)}


def compute_scaled_idf(texts: Sequence[Iterable[int]], vocab_size: int) -> Tensor:
    """Inverse document frequency of each token id, scaled to [0, 1], float64, ``(V,)``.

    ``log((1 + n) / (1 + n_token)) / log((1 + n) / 2)``: 1 for a token of a single text, 0 for a
    token of every text. A token of no text gets 0 too: it is never a regression target.
    """
    if len(texts) < 2:
        raise ValueError(
            f"sentences: {len(texts)} distinct texts, expected at least 2 to count document "
            "frequencies. To fix, pass real sentences (some thousands fit a useful sparse head)."
        )
    counts = Counter(token for text in texts for token in set(text))
    largest = math.log((1 + len(texts)) / 2)
    idf = torch.zeros(vocab_size, dtype=torch.float64)
    for token, count in counts.items():
        idf[token] = math.log((1 + len(texts)) / (1 + count)) / largest
    return idf


@torch.no_grad()
def fit_sparse_head(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    special_ids: Iterable[int],
    ridge: float = 1e-3,
) -> dict[str, Tensor]:
    """Fit ``weight . h + bias`` to the scaled IDF of each token by ridge least squares.

    Solved in closed form from streamed float64 moments, so memory does not grow with the texts. The
    penalty is ``ridge`` times the mean variance of a hidden dimension; the bias is not penalised.

    Args:
        special_ids: Token ids that carry no lexical weight and are left out.
        ridge: Relative strength of the penalty, above 0: hidden states behind a LayerNorm satisfy
            one linear equation, so the system without a penalty is singular.

    Returns:
        ``{"weight": (1, H), "bias": (1,)}`` in float32, the content of ``sparse_linear.pt``.
    """
    if not 0 < ridge < math.inf:
        raise ValueError(
            f"ridge is {ridge}, expected a number above 0. To fix, use the default of 1e-3."
        )
    skip = torch.tensor(sorted(special_ids))
    texts = [set(row) for batch in batches for row in batch["input_ids"].tolist()]
    idf = compute_scaled_idf(texts, model.config.vocab_size)
    size = model.config.hidden_size + 1  # the target rides along as the last column
    first, second, count = idf.new_zeros(size), idf.new_zeros(size, size), 0
    for batch in batches:
        lexical = batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], skip)
        hidden = model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
        hidden = hidden.last_hidden_state[lexical].double()
        rows = torch.cat([hidden, idf[batch["input_ids"][lexical]].unsqueeze(1)], dim=1)
        first, second, count = first + rows.sum(0), second + rows.T @ rows, count + len(rows)
    if count == 0:
        raise ValueError(
            "sentences: only special and unknown tokens, expected words of the tokenizer's "
            "vocabulary. To fix, pass sentences in the language of the model."
        )
    return _solve_ridge(first / count, second / count, ridge)


def _solve_ridge(mean: Tensor, moment: Tensor, ridge: float) -> dict[str, Tensor]:
    """Linear head from first ``(H + 1,)`` and second ``(H + 1, H + 1)`` moments, target last."""
    covariance = moment - torch.outer(mean, mean)
    inputs, target = covariance[:-1, :-1], covariance[:-1, -1]
    penalty = ridge * inputs.diagonal().mean() * torch.eye(len(target), dtype=mean.dtype)
    weight = torch.linalg.solve(inputs + penalty, target)
    bias = mean[-1] - weight @ mean[:-1]
    return {"weight": weight.float().unsqueeze(0), "bias": bias.float().reshape(1)}


def write_stand_ins(folder: Path, sentences: Sequence[str]) -> dict[str, int]:
    """Give a folder of an encoder both heads; the sparse one is fitted on some thousand texts.

    Raises:
        ValueError: If there are too few of them.
    """
    texts, config = list(dict.fromkeys(sentences)), read_hf_config(folder)
    logger.info("fitting the sparse head on %d texts", len(texts))
    files = read_tokenizer_files(folder, config["vocab_size"])
    tokenizer = build_tokenizer(files["tokenizer.json"], read_max_seq_length(folder, config))
    model = AutoModel.from_pretrained(folder).eval()
    batches = _tokenize(tokenizer, texts, config["pad_token_id"])
    sparse = fit_sparse_head(model, batches, read_special_ids(files))
    for name, head in zip(
        HEADS, (compute_identity_head(config["hidden_size"]), sparse), strict=True
    ):
        torch.save(head, folder / name)
    return {"sentences": len(texts)}


def _tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], pad_token_id: int, batch_size: int = 64
) -> list[dict[str, Tensor]]:
    """Batches of texts sorted by length, which leaves little padding, in a fixed order."""
    ordered = sorted(texts, key=lambda text: (len(text), text))
    rows = [np.array(encoding.ids) for encoding in tokenizer.encode_batch(ordered)]
    starts = range(0, len(rows), batch_size)
    batches = [pad_texts(rows[start : start + batch_size], pad_token_id) for start in starts]
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in batches]
