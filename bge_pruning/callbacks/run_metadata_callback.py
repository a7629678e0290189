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
        """Ignore the checkpoint: a resumed run makes its metadata from its own config."""


if RunMetadataCallback.__name__ != METADATA_KEY:
    raise RuntimeError(f"checkpoints look for {METADATA_KEY}; rename one of the two.")
