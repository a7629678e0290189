"""Watches the outputs themselves: collapse, empty sparse vectors, losses that are no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer.core import Callback, State, Time
from composer.loggers import Logger
from torch import Tensor

from bge_pruning.clock import count_batches, elapsed_share


class EmbeddingCallback(Callback):
    """Logs the health of this rank's training batch every ``log_interval``.

    =================================  ===========================================================
    key                                value
    =================================  ===========================================================
    ``embedding/dense/cosine_mean``    mean cosine of all pairs of texts of the batch
    ``embedding/dense/cosine_std``     its standard deviation; near 0, all texts look alike
    ``embedding/sparse/nonzeros``      mean number of different tokens with a weight, per text
    ``embedding/sparse/empty_share``   share of texts without any
    ``embedding/colbert/cosine_mean``  mean cosine of the vectors of neighbouring tokens
    =================================  ===========================================================

    Sparse and multi-vector rows are there if the loss trains that output.

    Args:
        log_interval: Time string.
        special_ids: Token ids that carry no sparse weight.

    Raises:
        RuntimeError: If a loss is not finite, before it reaches the weights.
    """

    def __init__(self, log_interval: str, special_ids: Sequence[int] = ()) -> None:
        self.interval = Time.from_timestring(log_interval)
        self.special_ids = tuple(special_ids)

    def after_loss(self, state: State, logger: Logger) -> None:
        """Stop at a loss that is no number; the last checkpoint stays as it is."""
        losses = state.loss if isinstance(state.loss, dict) else {"total": state.loss}
        # The total alone in every step: each look waits for the device.
        if not losses["total"].isfinite().all():
            broken = [name for name, value in losses.items() if not value.isfinite().all()]
            raise RuntimeError(
                f"step {state.timestamp.batch.value}: {', '.join(broken)} of the loss is not "
                f"finite. To fix, lower optimizer.lr or look for broken texts; the last checkpoint "
                f"is kept, and autoresume=true goes on from it."
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log at the interval and at the last batch."""
        interval = count_batches(self.interval, state)
        if state.timestamp.batch.value % interval and elapsed_share(state) < 1.0:
            return
        logger.log_metrics(compute_embedding_health(state.outputs, state.batch, self.special_ids))


@torch.no_grad()
def compute_embedding_health(
    outputs: dict[str, Tensor], batch: dict[str, Tensor], special_ids: Sequence[int]
) -> dict[str, float]:
    """Everything in the table of :class:`EmbeddingCallback`.

    Args:
        outputs: Of a training step, ``(B, N, ...)`` by name.
        batch: Its ``input_ids`` and ``attention_mask``, shape ``(B, N, T)``.
        special_ids: Token ids that carry no sparse weight.
    """
    dense = outputs["dense_vecs"].flatten(0, 1).float()
    others = ~torch.eye(len(dense), dtype=torch.bool, device=dense.device)
    cosines = (dense @ dense.T)[others]
    health = {
        "embedding/dense/cosine_mean": float(cosines.mean()),
        "embedding/dense/cosine_std": float(cosines.std(correction=0)),
    }
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    if "token_weights" in outputs:
        special = torch.tensor(special_ids, device=ids.device, dtype=ids.dtype)
        lit = (outputs["token_weights"].flatten(0, 1) > 0) & ~torch.isin(ids, special)
        counts = [len(row[on].unique()) for row, on in zip(ids, lit, strict=True)]
        health["embedding/sparse/nonzeros"] = sum(counts) / len(counts)
        health["embedding/sparse/empty_share"] = counts.count(0) / len(counts)
    if "colbert_vecs" in outputs:
        vectors = outputs["colbert_vecs"].flatten(0, 1).float()
        neighbours = (vectors[:, 1:] * vectors[:, :-1]).sum(-1)[mask[:, 2:].bool()]
        health["embedding/colbert/cosine_mean"] = float(neighbours.mean())
    return health
