"""The map from the vectors of a pruned model to those of the original, and ``modules.json``.

sentence-transformers applies every module that the file lists. text-embeddings-inference knows four
kinds by their classic names; a single type that it does not know, and it goes on without any Dense
module, with no more than a warning in its log. vLLM looks for the classic name of Dense alone.

An index of the original's vectors keeps working if queries arrive in its space. The pruned model's
vectors are the original's kept dimensions, so putting zeros where a dimension was removed gives the
masked model's vector, exactly. What the removed dimensions hold can partly be told from the kept
ones: a least-squares map, fitted on texts, comes nearer to the original.

The map is a Dense module between pooling and normalisation. sentence-transformers, vLLM and the
Candle backend of text-embeddings-inference apply it; its ONNX backend knows no modules, but takes
an output ``sentence_embedding`` of the graph, see :mod:`bge_pruning.export.onnx_graph`.
FlagEmbedding and transformers do not apply it: there :func:`project` is left to the user.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor

from bge_pruning.model_io.hub import INNER, encoder_folder
from bge_pruning.model_io.model_files import ForeignModelError, read_json, read_safetensors
from bge_pruning.utils.json_records import Record, Text, parse_record

CLASSIC = "sentence_transformers.models."
# Modules that this project applies, in their order, and where they lie; ``None`` is anywhere.
APPLIED = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": None}


class Module(NamedTuple):
    """One module of a folder; its class has the package if that is not sentence-transformers."""

    kind: str
    path: str


def compute_modules(projected: bool) -> list[dict[str, Any]]:
    """Content of ``modules.json`` as this project writes it."""
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
    """The modules of a folder, in their order; none if it has no ``modules.json``."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = parse_record(entries, list[_Entry], path.name, "copy it again")
        return [_module(entry) for entry in found]
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: is not a list of modules with path and type ({error}). To fix, copy it again."
        ) from error


class _Entry(Record):
    type: Text
    path: Text


def _module(entry: _Entry) -> Module:
    """Newer versions write longer types: ``sentence_transformers.base.modules.dense.Dense``."""
    own = entry.type.startswith("sentence_transformers.")
    return Module(entry.type.rpartition(".")[2] if own else entry.type, entry.path)


def check_modules(folder: Path) -> list[Module]:
    """The modules of a folder, all of which this project applies.

    Raises:
        ForeignModelError: If one is not applied here, or not in this order or place.
        ValueError: If ``modules.json`` does not hold a list of modules.
    """
    modules = read_modules(folder)
    rest = list(APPLIED)
    applied = ", ".join(f"{kind} in '{path}'" if path else kind for kind, path in APPLIED.items())
    inner = INNER if encoder_folder(folder) != folder else ""
    for kind, path in modules:
        place = inner if kind == "Transformer" else APPLIED.get(kind)
        if kind not in rest or place not in (path, None):
            raise ForeignModelError(
                f"{folder / 'modules.json'}: the module {kind} in '{path}' is not applied here, so "
                f"dense vectors would be others than sentence-transformers'; expected at most "
                f"{applied}, in this order. To fix, choose another model, or take the "
                f"module out of the file to use the encoder without it."
            )
        del rest[: rest.index(kind) + 1]
    return modules


# The module between pooling and normalisation, as sentence-transformers numbers it.
FOLDER = APPLIED["Dense"]
WEIGHT = "linear.weight"
# What text-embeddings-inference calls no activation; it knows Tanh besides, and nothing else.
NO_ACTIVATION = "torch.nn.modules.linear.Identity"
# Settings of sentence-transformers' Dense, as far as they may be set for a plain linear map of the
# pooled vector. A file may leave out those with None; older versions do not know them.
_PLAIN = {
    "bias": (False,),
    "activation_function": (NO_ACTIVATION, "torch.nn.Identity"),
    "module_input_name": (None, "sentence_embedding"),
    "module_output_name": (None, "sentence_embedding"),
    "use_residual": (None, False),
}
# Share of the vectors' energy that is added to the diagonal: keeps few texts from being fitted.
RIDGE = 1e-3


def compute_selection(kept: Sequence[int], size: int) -> Tensor:
    """The map that puts every kept dimension in its place, 0 elsewhere; float32, ``(S, H)``."""
    selection = torch.zeros(size, len(kept))
    selection[list(kept), range(len(kept))] = 1.0
    return selection


def fit_projection(pruned: np.ndarray, original: np.ndarray, kept: Sequence[int]) -> Tensor:
    """The linear map that brings pruned vectors nearest to the original's, by least squares.

    The difference to :func:`compute_selection` is what is penalised: with few texts the result is
    the selection.

    Args:
        pruned: L2-normalised vectors of texts, shape ``(n, H)``.
        original: The original's vectors of the same texts, L2-normalised, shape ``(n, S)``.

    Returns:
        Float32, shape ``(S, H)``.
    """
    count, hidden = pruned.shape
    if count < hidden:
        raise ValueError(
            f"{count} different texts do not determine a map from {hidden} dimensions. To fix, "
            f"give at least {hidden} texts, better ten times as many."
        )
    x, y = pruned.astype(np.float64), original.astype(np.float64)
    selection = compute_selection(kept, y.shape[1]).double().numpy()
    gram = x.T @ x
    gram += RIDGE * np.trace(gram) / hidden * np.eye(hidden)
    change = np.linalg.solve(gram, x.T @ (y - x @ selection.T))
    return torch.from_numpy(selection + change.T).float()


def project(vectors: Tensor, projection: Tensor) -> Tensor:
    """L2-normalised vectors in the original's dimensions, shape ``(n, S)``."""
    return F.normalize(F.linear(vectors, projection.to(vectors)), dim=-1)


def write_projection(folder: Path, projection: Tensor) -> None:
    """Write the map as a Dense module of sentence-transformers, float32.

    Only keys that every version knows: 5.2 passes all of them to its constructor. sentence-
    transformers casts the weights to the encoder's precision when it loads them.
    """
    place = folder / FOLDER
    place.mkdir()
    config = {
        "in_features": projection.shape[1],
        "out_features": projection.shape[0],
        "bias": False,
        "activation_function": NO_ACTIVATION,
    }
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {WEIGHT: projection.detach().cpu().float().contiguous()}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes files that only their owner can read; a server may run as someone else.
    shutil.copymode(place / "config.json", place / "model.safetensors")


def read_projection(folder: Path) -> Tensor | None:
    """The map ``(S, H)`` between pooling and normalisation, if ``modules.json`` names one.

    Raises:
        ForeignModelError: If the folder has modules that are not applied here, or its Dense module
            is not a plain linear map.
        FileNotFoundError: If a file of the module is missing.
        ValueError: If a file is damaged, or they disagree.
    """
    if all(kind != "Dense" for kind, _ in check_modules(folder)):
        return None
    path = folder / FOLDER / "config.json"
    config = read_json(path)
    if not all(config.get(key) in allowed for key, allowed in _PLAIN.items()):
        raise ForeignModelError(
            f"{path}: is not a linear map without bias and activation, which is all that can be "
            f"read here. To fix, use sentence-transformers for this model."
        )
    return _read_weight(folder / FOLDER / "model.safetensors", config)


def _read_weight(path: Path, config: dict[str, Any]) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. To fix, copy the whole model folder.")
    state = read_safetensors(path)
    found = {name: tuple(value.shape) for name, value in state.items()}
    expected = {WEIGHT: (config.get("out_features"), config.get("in_features"))}
    if found != expected:
        raise ValueError(
            f"{path}: holds {found}, but its config.json says {expected}. To fix, use the files of "
            f"the same model."
        )
    return state[WEIGHT].float()
