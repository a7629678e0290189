"""Reading a training checkpoint back into encoder, heads and gates, without unpickling code.

A checkpoint is self-contained: next to the weights it holds what :class:`RunMetadata` describes.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bge_pruning.model_io.pretrained import (
    BaseModel,
    build_modules,
    describe_load_error,
    load_strict,
)
from bge_pruning.model_io.run_metadata import RunMetadata, check_metadata
from bge_pruning.model_io.sharded_checkpoint import is_sharded, read_sharded_state
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.structural_pruning import KeepIndices, PruningMasks

METADATA_KEY = "RunMetadataCallback"
WORD_TABLE = "backbone.embeddings.word_embeddings.weight"
# Written by runs that save the best checkpoint. Composer neither resumes from it nor deletes it,
# because it looks for other names.
BEST_CHECKPOINT = "best-rank0.pt"
BEST_KEY = "best"
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# First bytes of what torch.save writes, a zip archive.
ARCHIVE = b"PK\x03\x04"
# Composer stores times, versions and NumPy's random state beside the tensors: data, not code.
PLAIN_TYPES = [
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np._core.multiarray._reconstruct,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]


@dataclass
class TrainedModel:
    """A model read from a checkpoint."""

    metadata: RunMetadata
    shape: EncoderShape
    backbone: XLMRobertaBackbone
    heads: EmbeddingHeads
    l0_module: L0Module | None
    batch: int


@dataclass(frozen=True)
class BestScore:
    """The score that makes a checkpoint the best of its run; a larger one is better."""

    metric: str
    score: float
    batch: int


@dataclass(frozen=True)
class Progress:
    """How far a training came, over all its starts.

    Attributes:
        batches: Steps.
        tokens: Real tokens of all texts trained on.
        seconds: Time until the last step was done; what comes after it, such as the last
            evaluation, is not in it.
    """

    batches: int
    tokens: int
    seconds: float


def find_checkpoint(path: Path, best: bool = False) -> Path:
    """The checkpoint of a run folder, or the checkpoint itself: a file, or a sharded run's folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    if best and path.exists():
        if not (path / BEST_CHECKPOINT).is_file():
            raise FileNotFoundError(
                f"{path}: holds no {BEST_CHECKPOINT}. To fix, name the folder of a run with "
                f"evaluation.keep_best that was evaluated, or leave out --best."
            )
        return path / BEST_CHECKPOINT
    if path.is_dir() and not is_sharded(path):
        latest = path / "latest-rank0.pt"
        if not latest.exists():
            raise FileNotFoundError(
                f"{path}: holds no latest-rank0.pt, so no checkpoint was saved. To fix, choose the "
                f"folder of a run that reached its first save_interval."
            )
        return latest
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such run folder or checkpoint. To fix, check the path."
        )
    return path


def read_best_score(checkpoint: Path) -> BestScore:
    """Read the score of a best checkpoint without reading its weights."""
    state = load_state(checkpoint)
    try:
        return BestScore(**state[BEST_KEY])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint}: does not say what it is the best by ({error!r}). To fix, remove it: a "
            f"run writes it again at its next best evaluation."
        ) from error


def read_progress(checkpoint: Path) -> Progress:
    """Read how far the training of a checkpoint came, without reading its weights."""
    state = load_state(checkpoint)
    try:
        clock = state["state"]["timestamp"]["Timestamp"]
        seconds = clock["total_wct"].total_seconds()
        return Progress(int(clock["batch"]), int(clock["token"]), seconds)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint}: damaged: it holds no time ({error!r}). To fix, use an earlier "
            f"checkpoint of the run."
        ) from error


def load_trained_model(checkpoint: Path) -> TrainedModel:
    """Read a checkpoint, which must not be written to while the model is used.

    The weights are parts of the mapped file: memory is taken when they are used, and changing them
    does not change the file. The rest of the file, such as an optimizer's state, is not read. The
    checkpoint of a sharded run is read into memory.

    Raises:
        ValueError: If the file is damaged, is not of this project, or does not fit itself.
    """
    state = load_state(checkpoint)
    metadata = _metadata(state, checkpoint)
    weights, batch = _weights_and_batch(state, checkpoint)
    shape = EncoderShape(**metadata.shape)
    backbone, heads = build_modules(shape, metadata.hf_config, metadata.pooling)
    if WORD_TABLE in weights and not is_sharded(checkpoint):
        # The memory of a mapped file is given back when the last of its tensors goes. The largest
        # one gets a mapping of its own, so that it can go while the others are still used.
        weights[WORD_TABLE] = load_state(checkpoint)["state"]["model"][WORD_TABLE]
    for name, module in (("backbone", backbone), ("heads", heads)):
        load_strict(module.eval(), _with_prefix(weights, f"{name}."), f"{checkpoint} ({name})")
    # Takes memory by the sizes of the shape, which are those of the weights by now.
    try:
        l0_module = build_l0_module(shape, metadata.l0_module)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{checkpoint}: run metadata: these gates are not of this version ({error}). To fix, "
            f"extract with the version that wrote it ({metadata.versions})."
        ) from error
    if l0_module is not None:
        tensors = _with_prefix(weights, "l0_module.")
        load_strict(l0_module.eval(), tensors, f"{checkpoint} (l0_module)")
    return TrainedModel(metadata, shape, backbone, heads, l0_module, batch)


def build_l0_module(shape: EncoderShape, arguments: dict[str, Any] | None) -> L0Module | None:
    """The gates that :attr:`RunMetadata.l0_module` describes."""
    if arguments is None:
        return None
    target = arguments["target"] and EncoderShape(**arguments["target"])
    return L0Module(shape, **{**arguments, "target": target})


def _with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@contextmanager
def allow_plain_types() -> Iterator[None]:
    """Restrict every ``torch.load`` inside the block to tensors and plain values."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            yield
    finally:
        del os.environ[WEIGHTS_ONLY]
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before


def load_state(path: Path) -> dict[str, Any]:
    """Load a checkpoint; its tensors are parts of the file, mapped privately.

    Of a sharded run's folder, only what extraction needs is read, into memory.
    """
    try:
        if path.is_dir():
            with torch.serialization.safe_globals(PLAIN_TYPES):
                return read_sharded_state(path)
        with path.open("rb") as file:
            if file.read(len(ARCHIVE)) != ARCHIVE:  # torch would advise to save it in another way
                raise ValueError("not in the format of torch.save")
        with torch.serialization.safe_globals(PLAIN_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path}: damaged, not complete, or not a checkpoint of this project "
            f"({describe_load_error(error)}). To fix, use an earlier checkpoint of the run."
        ) from error


def _weights_and_batch(state: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], int]:
    try:
        return state["state"]["model"], int(state["state"]["timestamp"]["Timestamp"]["batch"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: damaged: it holds no model or no time ({error!r}). To fix, use an earlier "
            f"checkpoint of the run."
        ) from error


def _metadata(state: dict[str, Any], path: Path) -> RunMetadata:
    try:
        callbacks = dict(state["state"]["callbacks"])
        metadata = RunMetadata.from_state_dict(callbacks[METADATA_KEY])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        known = ", ".join(f.name for f in fields(RunMetadata))
        raise ValueError(
            f"{path}: is not a checkpoint of this project: it holds no run metadata ({known}). To "
            f"fix, choose a checkpoint that bge_pruning.train wrote."
        ) from error
    check_metadata(metadata, path)
    return metadata


def final_gates(model: TrainedModel) -> tuple[PruningMasks, EncoderShape]:
    """The units that a model keeps, and its sizes after the cut."""
    if model.l0_module is None:
        return PruningMasks(), model.shape
    return model.l0_module.deterministic_masks(), model.l0_module.realised_shape()


def as_base_model(model: TrainedModel, name: str) -> BaseModel:
    """Turn the uncut model of a checkpoint into a base model that shares its weights."""
    metadata = model.metadata
    return BaseModel(
        name=name,
        shape=model.shape,
        hf_config=metadata.hf_config,
        backbone=model.backbone,
        heads=model.heads,
        tokenizer_files=metadata.tokenizer_files,
        max_seq_length=metadata.max_seq_length,
        pruning=None,
        prompts=metadata.prompts or {},
    )


def cut(backbone: XLMRobertaBackbone, heads: EmbeddingHeads, keep: KeepIndices) -> None:
    """Cut encoder and heads in place."""
    backbone.prune(keep)
    heads.prune(keep.hidden)
