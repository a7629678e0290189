"""What a checkpoint says about its run beside the weights, and the check of what was read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from bge_pruning.model_io.model_files import Prompts
from bge_pruning.utils.json_records import (
    Count,
    Flag,
    Number,
    Positive,
    Record,
    Size,
    Text,
    one_of,
    parse_json,
    parse_record,
)
from bge_pruning.utils.records import Pooling, PruningRecord, Shape


@dataclass(frozen=True)
class RunMetadata:
    """What extraction needs besides the weights; plain values only.

    Attributes:
        l0_module: Arguments of :class:`L0Module` (``axes``, ``target``, ``target_parameters``,
            ``seed``, ...), ``None`` for a run without gates.
        source_pruning: ``pruning.json`` of the base model if that was itself extracted.
        tokenizer_files: Contents by name.
        prompts: ``config_sentence_transformers.json`` of the base model, as far as it says what to
            write before a text (``prompts``, ``default_prompt_name``).
        origin: Hub name of the base model, see :class:`bge_pruning.model_io.hub.Origin`.
        refit_texts: Texts that the model was fitted to its source on before training, at most.
    """

    base_model: str
    shape: dict[str, Any]
    hf_config: dict[str, Any]
    pooling: str
    max_seq_length: int
    seed: int
    l0_module: dict[str, Any] | None
    source_pruning: dict[str, Any] | None
    versions: dict[str, str]
    tokenizer_files: dict[str, bytes]
    revision: str | None = None
    prompts: dict[str, Any] | None = None
    license: str | None = None
    origin: str | None = None
    refit_texts: int = 0

    def state_dict(self) -> dict[str, Any]:
        """JSON text and byte tensors: types that ``weights_only`` loading allows."""
        plain = {k: v for k, v in asdict(self).items() if k != "tokenizer_files"}
        # Not torch.frombuffer, which refuses an empty file.
        arrays = {n: np.frombuffer(c, np.uint8).copy() for n, c in self.tokenizer_files.items()}
        files = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {"json": json.dumps(plain), "tokenizer_files": files}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RunMetadata:
        """Inverse of :meth:`state_dict`."""
        files = {k: v.numpy().tobytes() for k, v in state["tokenizer_files"].items()}
        plain = parse_json(state["json"].encode("utf-8"), "run metadata", "use another checkpoint")
        return cls(**plain, tokenizer_files=files)


class _FullShape(Shape):
    num_attention_heads: Size
    vocab_size: Size
    head_dim: Size
    max_position_embeddings: Size
    type_vocab_size: Size
    pooler: Flag
    sparse_head: Flag
    colbert_dim: Count


class _HfConfigRecord(Record):
    pad_token_id: Count
    layer_norm_eps: Number


class _GatesRecord(Record):
    axes: list[Annotated[str, one_of(("layer", "head", "intermediate", "hidden"))]]
    target: _FullShape | None
    target_parameters: Positive | None
    target_speedup: Positive | None = None
    target_length: Count | None = None
    start_sparsity: Number | None = None
    init_mean: Number | None = None
    init_std: Number | None = None
    seed: Count
    binarization: Number | None = None


class _MetadataRecord(Record):
    """What the JSON of :class:`RunMetadata` must hold."""

    base_model: Text
    shape: _FullShape
    hf_config: _HfConfigRecord
    pooling: Pooling
    max_seq_length: Count
    seed: Count
    l0_module: _GatesRecord | None
    source_pruning: PruningRecord | None
    versions: dict[str, Text]
    revision: Text | None = None
    prompts: Prompts | None = None
    license: Text | None = None
    origin: Text | None = None
    refit_texts: Count = 0


def check_metadata(metadata: RunMetadata, path: Path) -> None:
    """Refuse what no training of this project writes."""
    fix = "use an earlier checkpoint, or extract with the version that wrote it"
    parse_record(vars(metadata), _MetadataRecord, f"{path}: run metadata", fix)
    if metadata.hf_config["pad_token_id"] >= metadata.shape["vocab_size"]:
        raise ValueError(
            f"{path}: run metadata: pad_token_id {metadata.hf_config['pad_token_id']} is not one "
            f"of the {metadata.shape['vocab_size']} tokens. To fix, {fix}."
        )
    if "tokenizer.json" not in metadata.tokenizer_files:
        raise ValueError(f"{path}: run metadata: has no tokenizer.json. To fix, {fix}.")
