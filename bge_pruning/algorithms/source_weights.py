"""Gives more batches to the sources that pruning has hurt most."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from composer.utils import dist

from bge_pruning.datasets.embedding_dataset import Batch
from bge_pruning.datasets.mixed_dataloader import MixedDataset, adapt_weights
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.utils.clock import count_batches

log = logging.getLogger(__name__)


class SourceWeights(Algorithm):
    """Dynamic batch loading of LLM-Shearing (arXiv:2310.06694, section 3.2).

    Before the first step the unpruned model's loss of each source is measured on fixed batches of
    this rank (``probes``), with all gates open. Every ``interval`` the loss is measured again with
    the present sub-network, and the weights move towards the sources whose loss has grown most.

    =========================  ==================================================================
    logged key                 value
    =========================  ==================================================================
    ``data/weight/<source>``   weight from this step on
    ``data/excess/<source>``   loss above that of the unpruned model
    =========================  ==================================================================
    """

    def __init__(
        self, dataset: MixedDataset, probes: Sequence[Sequence[Batch]], interval: str
    ) -> None:
        self.dataset = dataset
        self.probes = probes
        self.interval = Time.from_timestring(interval)
        self.references: list[float] | None = None

    def match(self, event: Event, state: State) -> bool:
        """Run before the first step, and at the interval."""
        if event == Event.FIT_START:
            return self.references is None
        if event != Event.BATCH_END:
            return False  # a share of the run is a number of batches only once there is data
        return state.timestamp.batch.value % self._length(state) == 0

    def _length(self, state: State) -> int:
        return max(1, int(count_batches(self.interval, state)))

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Measure, and change the weights."""
        model = getattr(state.model, "module", state.model)
        if event == Event.FIT_START:
            self.references = self._measure(model, state, pruned=False)
            return
        losses = self._measure(model, state, pruned=True)
        schedule, names = self.dataset.schedule, self.dataset.names
        weights = adapt_weights(schedule.weights(), losses, self.references)
        schedule.update(weights)
        if self.dataset.prepare is not None:
            step = state.timestamp.batch.value
            self.dataset.prepare(step, step + self._length(state))
        excess = [loss - before for loss, before in zip(losses, self.references, strict=True)]
        logger.log_metrics({f"data/weight/{n}": w for n, w in zip(names, weights, strict=True)})
        logger.log_metrics({f"data/excess/{n}": e for n, e in zip(names, excess, strict=True)})
        shown = " | ".join(f"{n} {w:.3f}" for n, w in zip(names, weights, strict=True))
        log.info("step %d | weights of the sources | %s", state.timestamp.batch.value, shown)

    def _measure(self, model: ComposerBGEM3, state: State, pruned: bool) -> list[float]:
        """Mean loss of each source over its fixed batches and all ranks."""
        totals = []
        for batches in self.probes:
            losses = [model.probe(state.device.batch_to_device(b), pruned) for b in batches]
            total = torch.stack(losses).mean()
            dist.all_reduce(total)
            totals.append(float(total) / dist.get_world_size())
        return totals

    def state_dict(self) -> dict[str, Any]:
        """Return the unpruned model's losses, for checkpoints."""
        return {"references": self.references}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the unpruned model's losses."""
        self.references = state["references"]
