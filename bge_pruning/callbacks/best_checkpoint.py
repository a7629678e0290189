"""Keeps the checkpoint of the best evaluation of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from composer.core import State
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint

from bge_pruning.model_io.checkpoint import BEST_CHECKPOINT, BEST_KEY, BestScore, read_best_score
from bge_pruning.utils.files import atomic_file

log = logging.getLogger(__name__)


class BestCheckpoint:
    """A file beside the newest checkpoints: the weights of the step with the highest score.

    It holds what extraction needs and the score that made it the best, but not the optimizer's
    state, which is two thirds of a checkpoint. Every rank has to call the methods.
    """

    def __init__(self, metric: str, folder: Path) -> None:
        self.metric = metric
        self.path = folder / BEST_CHECKPOINT
        self.best: BestScore | None = None

    def start(self, state: State) -> None:
        """Delete the file if training starts from the beginning; otherwise read its score.

        A run that died after its newest checkpoint may have left a better one.
        """
        found = None
        if dist.get_global_rank() == 0 and self.path.is_file():
            if state.timestamp.batch.value == 0:
                self.path.unlink()
            else:
                found = read_best_score(self.path)
        self._adopt(dist.all_gather_object(found)[0])

    def _adopt(self, found: BestScore | None) -> None:
        """Accept a score by the same metric if it is the best."""
        if found is None or found.metric != self.metric:
            return
        if self.best is None or found.score > self.best.score:
            self.best = found

    def update(self, scores: Mapping[str, float], state: State) -> None:
        """Write the file if the model has never been better, and log the best score so far."""
        # All ranks write together, so the score of the first one decides.
        score = dist.all_gather_object(scores[self.metric])[0]
        if not math.isnan(score) and (self.best is None or score > self.best.score):
            self.best = BestScore(self.metric, score, state.timestamp.batch.value)
            self._save(state)
        if dist.get_global_rank() == 0 and self.best is not None:
            best = self.best
            log.info("best so far: %s %.4f at step %d", best.metric, best.score, best.batch)

    def _save(self, state: State) -> None:
        """Write under another name first, so that the file is always complete."""

        def reduce(content: dict[str, Any]) -> None:
            content["state"].pop("optimizers", None)
            content[BEST_KEY] = asdict(self.best)

        first = dist.get_global_rank() == 0  # the other ranks take part, and write nothing
        with atomic_file(self.path) if first else nullcontext(self.path) as path:
            save_checkpoint(state, str(path), ignore_keys=reduce)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far, for checkpoints."""
        return {BEST_KEY: None if self.best is None else asdict(self.best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best score of a checkpoint."""
        if (found := state.get(BEST_KEY)) is not None:
            self._adopt(BestScore(**found))
