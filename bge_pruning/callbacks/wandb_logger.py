"""Composer's W&B logger with the W&B releases that it does not know yet."""

from __future__ import annotations

from composer.core import State
from composer.loggers import Logger
from composer.loggers import WandBLogger as ComposerWandBLogger


class WandBLogger(ComposerWandBLogger):
    """Composer 0.32 asks a run for ``get_url()``, which W&B 0.31 has replaced by ``url``."""

    def init(self, state: State, logger: Logger) -> None:
        """Give runs the method that is asked for, and start one."""
        from wandb.sdk.wandb_run import Run

        if not hasattr(Run, "get_url"):
            Run.get_url = lambda run: run.url
        super().init(state, logger)
