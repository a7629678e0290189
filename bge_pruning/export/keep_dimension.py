"""Giving a written model the dimensions of the unpruned one, so that an index keeps working."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bge_pruning.datasets.sts_dataloader import read_texts
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.export.validation import TOLERANCE, ValidationError, sentence_vectors
from bge_pruning.model_io import model_files
from bge_pruning.model_io.model_files import PROMPT_NAMES, find_prompt
from bge_pruning.model_io.model_folder import write_sentence_transformers_files
from bge_pruning.model_io.pretrained import BaseModel, load_base_model
from bge_pruning.model_io.projection import compute_selection, fit_projection, project
from bge_pruning.utils.environment import default_device
from bge_pruning.utils.records import Projection, PruningRecord

log = logging.getLogger(__name__)


def add_projection(
    folder: Path, info: PruningRecord, texts: Sequence[str] = ()
) -> Projection | None:
    """Add the Dense module that brings dense vectors back to the unpruned model's dimensions.

    The map is fitted on files of texts, with each of the model's prompts for queries and passages;
    without any it puts zeros where a dimension is gone.
    Returns ``None`` if the model has all dimensions and there is nothing to add.

    Raises:
        FileNotFoundError: If a file or the unpruned model is not there.
        ValueError: If the unpruned model is not the one that was pruned, or has such a module
            itself, or the texts are too few.
        ValidationError: If sentence-transformers makes other vectors of the folder.
    """
    kept, size = info.kept.hidden, info.source_shape.hidden_size
    # An index of the source's vectors has the dimensions of its map, not those of its encoder.
    if info.source.projection is not None:
        raise ValueError(
            f"{info.source.base_model} was itself written with --keep-dimension: its vectors have "
            f"{info.source.projection.dimensions} dimensions, and training was in the {size} of "
            f"its encoder. To fix, leave --keep-dimension out, or prune the model that it was cut "
            f"from."
        )
    if len(kept) == size and not texts:
        log.info("dense vectors have all %d dimensions of the source: no map is needed", size)
        return None
    lines = read_texts(texts)
    projection = _fit(folder, info, lines) if texts else compute_selection(kept, size)
    plain = sentence_vectors(folder)
    _insert(folder, projection)
    difference = float((sentence_vectors(folder) - project(plain, projection)).abs().max())
    if not difference <= TOLERANCE:
        raise ValidationError(
            f"with the Dense module sentence-transformers is {difference:.1e} off, more than "
            f"{TOLERANCE:.0e}. To fix, report it with the checkpoint: it is a defect of extraction."
        )
    return Projection(
        kind="fitted" if texts else "selection",
        dimensions=size,
        texts=len(lines) if texts else None,
    )


def _fit(folder: Path, info: PruningRecord, texts: Sequence[str]) -> Tensor:
    source = info.source
    log.info("fitting the map on %d texts of %s", len(texts), source.base_model)
    texts = _with_prompts(texts, model_files.read_prompts(folder))
    pruned = _embed(load_base_model(str(folder)), texts)
    base = load_base_model(source.base_model, source.revision, info.pooling)
    size = info.source_shape.hidden_size
    if base.shape.hidden_size != size:
        raise ValueError(
            f"{source.base_model} has {base.shape.hidden_size} dimensions, but the model that "
            f"was pruned had {size}. To fix, put that model there again, or leave --fit-texts out."
        )
    return fit_projection(pruned, _embed(base, texts), info.kept.hidden)


def _with_prompts(texts: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Each text as it is embedded in use: as a query, as a passage, and with a default prompt."""
    query, passage, default = (find_prompt(config, role) for role in PROMPT_NAMES)
    return [p + t for p in dict.fromkeys([query, passage, default or query]) for t in texts]


def _embed(base: BaseModel, texts: Sequence[str]) -> np.ndarray:
    vectors = TextEncoder(base, default_device()).encode(texts).dense_vecs
    gc.collect()  # the encoder
    return vectors


def _insert(folder: Path, projection: Tensor) -> None:
    """Write the sentence-transformers files again, with the map between pooling and norm."""
    pooling, prompts = model_files.read_pooling(folder), model_files.read_prompts(folder)
    length = model_files.read_max_seq_length(folder, model_files.read_hf_config(folder))
    for name in ("1_Pooling", "2_Normalize"):
        shutil.rmtree(folder / name)
    size = projection.shape[1]
    write_sentence_transformers_files(folder, pooling, size, length, prompts, projection)
