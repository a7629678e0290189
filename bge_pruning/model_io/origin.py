"""Whose model a folder holds: licence and hub name, as its own model card says."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bge_pruning.model_io.hub import is_hub_name

log = logging.getLogger(__name__)

CARD = "README.md"
# Licence identifiers of the hub: mit, apache-2.0, cc-by-4.0, other, ...
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, as far as its card says.

    Attributes:
        license: Identifier as the hub writes it, such as ``mit`` or ``apache-2.0``.
        name: Hub name of the model, or of the one that a local folder names as its base.
    """

    license: str | None = None
    name: str | None = None


def read_origin(folder: Path, name: str) -> Origin:
    """Licence and hub name of a model.

    Args:
        folder: Folder with the model's files.
        name: What the model was asked for by: that folder, or a hub name.

    Returns:
        What is known. A damaged card is a warning, never an error: training needs none of it.
    """
    card = _read_card(folder / CARD)
    license_id = _as_license(card.get("license"), folder / CARD)
    # A folder here may have the name of a model on the hub; the folder is what is read.
    if not Path(name).is_dir() and is_hub_name(name):
        return Origin(license_id, name)
    return Origin(license_id, _as_hub_name(card.get("base_model")))


def _read_card(path: Path) -> dict[str, Any]:
    """The metadata at the head of a model card; empty if there are none."""
    from huggingface_hub import metadata_load

    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, OSError, yaml.YAMLError) as error:  # no dictionary, no text, no YAML
        reason = " ".join(str(error).split())
        log.warning("%s: the metadata of the model card cannot be read (%s)", path, reason)
        return {}


def _as_license(value: Any, path: Path) -> str | None:
    only = _single(value)
    if only is None or (isinstance(only, str) and LICENSE.fullmatch(only)):
        return only
    log.warning("%s: license is %r, expected one identifier such as mit", path, value)
    return None


def _as_hub_name(value: Any) -> str | None:
    only = _single(value)
    return only if isinstance(only, str) and is_hub_name(only) else None


def _single(value: Any) -> Any:
    """The hub also takes a list; only a list of one says something about this model."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def hub_name(source: Mapping[str, Any]) -> str | None:
    """Hub name of the model that another was cut from, ``None`` if it has none.

    Args:
        source: ``source`` of ``pruning.json``: ``base_model``, and ``origin`` if it is known.
    """
    if source.get("origin"):
        return source["origin"]
    name = source["base_model"]
    return name if is_hub_name(name) and not Path(name).is_dir() else None


def display_name(source: Mapping[str, Any]) -> str:
    """Hub name, or the last part of a path: where somebody keeps a model is nobody's business.

    Args:
        source: As in :func:`hub_name`.
    """
    return hub_name(source) or Path(source["base_model"]).name


def hub_page(name: str) -> str:
    """Address of a model's page."""
    return f"https://huggingface.co/{name}"
