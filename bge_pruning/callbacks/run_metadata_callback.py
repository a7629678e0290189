"""Makes checkpoints self-contained."""

from __future__ import annotations

from typing import Any

from composer.core import Callback

from bge_pruning.model_io.checkpoint import METADATA_KEY, RunMetadata


class RunMetadataCallback(Callback):
    """Stores what extraction needs (sizes, tokenizer, gates' arguments) in every checkpoint.

    Args:
        metadata: The run's metadata.
    """

    def __init__(self, metadata: RunMetadata) -> None:
        self.metadata = metadata

    def state_dict(self) -> dict[str, Any]:
        """Saved under the class name, which :mod:`bge_pruning.model_io.checkpoint` looks for."""
        return self.metadata.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A resumed run keeps its own metadata, made from its own config."""


if RunMetadataCallback.__name__ != METADATA_KEY:
    raise RuntimeError(f"checkpoints look for {METADATA_KEY}; rename one of the two.")
