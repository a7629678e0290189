"""``modules.json``: what is computed after the encoder, for the tools that read it.

sentence-transformers applies every module that the file lists. text-embeddings-inference knows four
kinds by their classic names; a single type that it does not know, and it goes on without any Dense
module, with no more than a warning in its log. vLLM looks for the classic name of Dense alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from bge_pruning.utils.records import TEXT, check_record

CLASSIC = "sentence_transformers.models."
# Modules that this project applies, in their order, and where they lie; ``None`` is anywhere.
APPLIED = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": None}


class ForeignModuleError(ValueError):
    """Dense vectors of this model are not what this project would compute."""


class Module(NamedTuple):
    """One module of a folder.

    Attributes:
        kind: Name of its class; with the package if that is not sentence-transformers.
        path: Its folder within the model's; empty for the model's own.
    """

    kind: str
    path: str


def compute_modules(projected: bool) -> list[dict[str, Any]]:
    """Content of ``modules.json`` as this project writes it.

    Args:
        projected: Whether a linear map lies between pooling and normalisation, see
            :mod:`bge_pruning.model_io.projection`.
    """
    kinds = [kind for kind in APPLIED if projected or kind != "Dense"]
    return [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"{CLASSIC}{kind}",
        }
        for index, kind in enumerate(kinds)
    ]


def read_modules(folder: Path) -> list[Module]:
    """The modules of a folder, in their order; none if it has no ``modules.json``.

    Args:
        folder: Model folder.

    Raises:
        ValueError: If the file is no list of modules.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        check_record(entries, [{"type": TEXT, "path": TEXT}], path.name, "copy it again")
        return [_module(entry) for entry in entries]
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: is not a list of modules with path and type ({error}). To fix, copy it again."
        ) from error


def _module(entry: dict[str, str]) -> Module:
    """Newer versions write longer types: ``sentence_transformers.base.modules.dense.Dense``."""
    kind = entry["type"]
    own = kind.startswith("sentence_transformers.")
    return Module(kind.rpartition(".")[2] if own else kind, entry["path"])


def check_modules(folder: Path) -> list[Module]:
    """The modules of a folder, all of which this project applies.

    Args:
        folder: Model folder.

    Raises:
        ForeignModuleError: If one is not applied here, or not in this order or place.
        ValueError: If ``modules.json`` is no list of modules.
    """
    modules = read_modules(folder)
    rest = list(APPLIED)
    for kind, path in modules:
        if kind not in rest or APPLIED[kind] not in (path, None):
            raise ForeignModuleError(
                f"{folder / 'modules.json'}: the module {kind} in '{path}' is not applied here, so "
                f"dense vectors would be others than sentence-transformers'; expected at most "
                f"{_describe_applied()}, in this order. To fix, choose another model, or take the "
                f"module out of the file to use the encoder without it."
            )
        del rest[: rest.index(kind) + 1]
    return modules


def _describe_applied() -> str:
    return ", ".join(f"{kind} in '{path}'" if path else kind for kind, path in APPLIED.items())
