"""Stores the metadata of a run in its checkpoints, which makes them self-contained."""

from __future__ import annotations

from typing import Any

from composer.core import Callback

from bge_pruning.model_io.checkpoint import METADATA_KEY, RunMetadata


class RunMetadataCallback(Callback):
    """Stores sizes, tokenizer and the gates' arguments, which extraction needs, in checkpoints."""

    def __init__(self, metadata: RunMetadata) -> None:
        self.metadata = metadata

    def state_dict(self) -> dict[str, Any]:
        """Return the metadata; ``model_io.checkpoint`` looks for it under the class name."""
        return self.metadata.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep this run's own metadata, which is made from its configuration.

        Raises:
            ValueError: If the checkpoint is of a model that was cut elsewhere.
        """
        earlier = RunMetadata.from_state_dict(state)
        kept = [m.source_pruning and m.source_pruning["kept"] for m in (earlier, self.metadata)]
        if kept[0] != kept[1]:
            raise ValueError(
                f"the checkpoint is of {earlier.base_model} before it was cut anew. To fix, remove "
                f"the run folder, and the training begins again."
            )


if RunMetadataCallback.__name__ != METADATA_KEY:
    raise RuntimeError(f"checkpoints look for {METADATA_KEY}; rename one of the two.")
