"""Models by the name that YAML files use."""

from __future__ import annotations

from typing import Any

from bge_pruning.models.composer_bge_m3 import ComposerBGEM3

MODELS = {"composer_bge_m3": ComposerBGEM3}


def build_composer_model(name: str, **kwargs: Any) -> ComposerBGEM3:
    """Build a model by name."""
    if name not in MODELS:
        raise ValueError(f"model.name '{name}' is not one of {sorted(MODELS)}. To fix, choose one.")
    return MODELS[name](**kwargs)
