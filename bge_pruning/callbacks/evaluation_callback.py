"""Evaluates the model that would be extracted now: retrieval and sentence similarity."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist, model_eval_mode

from bge_pruning.callbacks.best_checkpoint import BestCheckpoint
from bge_pruning.config.names import PAIR_METRIC, RETRIEVAL_METRICS, metric_key
from bge_pruning.datasets.mteb_tasks import random_state_kept
from bge_pruning.evaluation.scoring import score_tasks
from bge_pruning.evaluation.tasks import Task
from bge_pruning.evaluation.text_encoder import Ranks, TextEncoder
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.utils.clock import is_due

log = logging.getLogger(__name__)


class EvaluationCallback(Callback):
    """Logs every ``eval_interval`` and at the last batch, before a checkpoint of that batch.

    ================================  ============================================================
    key                               value
    ================================  ============================================================
    ``eval/<task>/cosine_spearman``   of scored pairs, as Composer's evaluators computed it
    ``eval/<task>/ndcg_at_10``        of a collection, searched with dense vectors
    ``eval/<task>/mrr_at_10``         of the same search
    ``eval/<task>/recall_at_100``     of the same search
    ``eval/<task>/map_at_100``        of the same search
    ``eval/<task>/<mode>_<metric>``   of a search in another mode: ``sparse_ndcg_at_10``
    ``eval/seconds``                  time of the whole evaluation
    ================================  ============================================================

    ``<task>`` is the name of the source. The gates are those of the model's evaluation, see
    :meth:`L0Module.deterministic_masks`. Collections are evaluated by the code of the evaluation
    script, in float32 whatever the precision of training, and the ranks share their texts;
    similarity is computed in the precision of training.

    Args:
        tasks: Collections by name, as :func:`bge_pruning.evaluation.tasks.beir_task` makes them.
        max_length: Tokens at which the texts of collections are cut.
    """

    def __init__(
        self,
        base: BaseModel,
        tasks: Mapping[str, Task],
        eval_interval: str,
        *,
        modes: Sequence[str] = ("dense",),
        batch_size: int = 64,
        max_length: int | None = None,
        best: BestCheckpoint | None = None,
    ) -> None:
        self.base = base
        self.tasks = tasks
        self.interval = Time.from_timestring(eval_interval)
        self.modes = tuple(modes)
        self.batch_size = batch_size
        self.max_length = max_length
        self.best = best
        self._started: float | None = None
        self._announced = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Find the best score of a resumed run."""
        if self.best is not None:
            self.best.start(state)

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Start the clock before Composer's evaluators."""
        self._start(state)

    def _start(self, state: State) -> None:
        """Start the clock, and announce the first evaluation: it may take minutes."""
        self._started = time.monotonic()
        if not self._announced and dist.get_global_rank() == 0:
            names = ", ".join([*(evaluator.label for evaluator in state.evaluators), *self.tasks])
            log.info("step %d | evaluating %s", state.timestamp.batch.value, names)
        self._announced = True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Evaluate, log, and keep the checkpoint if it is the best."""
        if not is_due(self.interval, state):
            return
        if self._started is None:  # without scored pairs Composer evaluates nothing
            self._start(state)
        scores = {**_similarity(state), **self._retrieval(state)}
        seconds, self._started = time.monotonic() - self._started, None
        logger.log_metrics({f"eval/{key}": value for key, value in scores.items()})
        logger.log_metrics({"eval/seconds": seconds})
        if dist.get_global_rank() == 0:
            log.info("%s", _line(state.timestamp.batch.value, scores, seconds))
        if self.best is not None:
            self.best.update(scores, state)

    def _retrieval(self, state: State) -> dict[str, float]:
        if not self.tasks:
            return {}
        scores: dict[str, float] = {}
        with model_eval_mode(state.model), random_state_kept():  # mteb seeds everything
            encoder = self._encoder(getattr(state.model, "module", state.model))
            for name, task in self.tasks.items():
                for (_, mode), found in score_tasks(encoder, [task], self.modes).items():
                    scores |= {metric_key(name, mode, m): v for m, v in found.values.items()}
        return scores

    @torch.no_grad()
    def _encoder(self, model: ComposerBGEM3) -> TextEncoder:
        """Wrap the model with the gates of its evaluation, on its device."""
        masks = None
        if model.l0_module is not None:
            masks = model.l0_module.deterministic_masks(at_target=model.eval_target_model)
        return TextEncoder(
            replace(self.base, backbone=model.backbone, heads=model.heads),
            str(next(model.parameters()).device),
            self.max_length,
            self.batch_size,
            masks,
            Ranks(dist.get_global_rank(), dist.get_world_size(), dist.all_gather_object),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far, for checkpoints."""
        return {} if self.best is None else self.best.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best score of a checkpoint."""
        if self.best is not None:
            self.best.load_state_dict(state)


def _similarity(state: State) -> dict[str, float]:
    """Compute the metrics on every rank, because a metric may wait for the others."""
    return {
        f"{evaluator.label}/{name}": float(metric.compute())
        for evaluator in state.evaluators
        for name, metric in state.eval_metrics[evaluator.label].items()
    }


def _line(batch: int, scores: Mapping[str, float], seconds: float) -> str:
    """The main scores, as one line of the log."""
    main = (PAIR_METRIC, RETRIEVAL_METRICS[0])
    shown = [f"{key} {value:.4f}" for key, value in scores.items() if key.endswith(main)]
    return " | ".join([f"step {batch}", "evaluation", *shown, f"{seconds:.1f} s"])
