"""Logs the health of the outputs: collapse, empty sparse vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer.core import Callback, State, Time
from composer.loggers import Logger
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bge_pruning.utils.clock import is_due
from bge_pruning.utils.embedding_metrics import compute_alignment, compute_uniformity

# Scored pairs count as positive from this score on, in a range of [0, 1].
POSITIVE_SCORE = 0.8


class EmbeddingCallback(Callback):
    """Logs the health of this rank's training batch, or last microbatch, every ``log_interval``.

    =================================  ===========================================================
    key                                value
    =================================  ===========================================================
    ``embedding/dense/cosine_mean``    mean cosine of all pairs of texts of the batch
    ``embedding/dense/cosine_std``     its standard deviation; near 0, all texts look alike
    ``embedding/dense/alignment``      mean squared distance of positive pairs; 0 is closest
    ``embedding/dense/uniformity``     of all texts; near 0 alike, -4 spread evenly
    ``embedding/sparse/nonzeros``      mean number of different tokens with a weight, per text
    ``embedding/sparse/empty_share``   share of texts without any
    ``embedding/colbert/cosine_mean``  mean cosine of the vectors of neighbouring tokens
    ``embedding/colbert/norm_mean``    mean length of all tokens' vectors, not normalised yet
    =================================  ===========================================================

    Sparse and multi-vector rows are logged if the loss trains that output, and the alignment if the
    batch has positive pairs: queries with their positives, or scored pairs in the upper fifth of
    their range (0.8 or more, which is 4 of 5 in the STS benchmark).
    """

    def __init__(self, log_interval: str, special_ids: Sequence[int] = ()) -> None:
        self.interval = Time.from_timestring(log_interval)
        self.special_ids = tuple(special_ids)
        self._norms: list[Tensor] = []
        self._mask: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Record norms at the multi-vector head in a step that will be logged."""
        head = getattr(state.model, "module", state.model).heads.colbert_linear
        if head is not None and is_due(self.interval, state, ahead=1):
            self._norms, self._mask = [], state.batch["attention_mask"].flatten(0, 1).bool()
            self._hook = head.register_forward_hook(self._keep_norms)

    def _keep_norms(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._norms.append(output.detach().float().norm(dim=-1))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log at the interval and at the last batch."""
        if not is_due(self.interval, state):
            return
        # Only the outputs of the last microbatch are left, which has the last rows.
        dense = state.outputs["dense_vecs"]
        batch = {k: v if isinstance(v, str) else v[-len(dense) :] for k, v in state.batch.items()}
        # The trainer moves each microbatch to the device, but not the whole batch.
        batch = {k: v.to(dense.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        health = compute_embedding_health(state.outputs, batch, self.special_ids)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._norms:
            # Cached gradients run the head twice; the first run is the forward pass.
            norms = torch.cat(self._norms)
            if norms.ndim == 1:  # packed: without padding
                norms = norms[: int(self._mask.sum())]
            else:
                norms = norms[: len(self._mask)][self._mask]
            health["embedding/colbert/norm_mean"] = float(norms.mean())
            self._norms = []
        logger.log_metrics(health)


@torch.no_grad()
def compute_embedding_health(
    outputs: dict[str, Tensor], batch: dict[str, Tensor], special_ids: Sequence[int]
) -> dict[str, float]:
    """Compute everything in the table of :class:`EmbeddingCallback`.

    Outputs are ``(B, N, ...)``, token ids and mask ``(B, N, T)``. Special ids carry no weight.
    """
    dense = outputs["dense_vecs"].flatten(0, 1).float()
    health = {}
    if len(dense) > 1:
        others = ~torch.eye(len(dense), dtype=torch.bool, device=dense.device)
        cosines = (dense @ dense.T)[others]
        health["embedding/dense/cosine_mean"] = float(cosines.mean())
        health["embedding/dense/cosine_std"] = float(cosines.std(correction=0))
        health["embedding/dense/uniformity"] = compute_uniformity(dense)
    first, second = positive_pairs(outputs["dense_vecs"].float(), batch)
    if len(first):
        health["embedding/dense/alignment"] = compute_alignment(first, second)
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


def positive_pairs(dense: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Find the vectors of the texts of a batch that should be close: two of shape ``(pairs, H)``.

    The batch has ``scores`` ``(B,)`` in [0, 1] of pairs, or ``passage_texts`` ``(B, N - 1)`` and
    ``positive_texts`` ``(B, K)`` of queries with passages; or neither. Vectors are ``(B, N, H)``.
    """
    if "passage_texts" in batch:
        known = batch["passage_texts"][:, :, None] == batch["positive_texts"][:, None, :]
        query, passage = known.any(-1).nonzero(as_tuple=True)
        return dense[query, 0], dense[query, passage + 1]
    if "scores" in batch:
        pairs = dense[batch["scores"] >= POSITIVE_SCORE]
        return pairs[:, 0], pairs[:, 1]
    return dense[:0, 0], dense[:0, 0]
