"""Base models: from the Hugging Face hub or a folder, with BGE-M3's heads where it has them.

BAAI/bge-m3 ships ``pytorch_model.bin``, ``colbert_linear.pt`` and ``sparse_linear.pt``; other
XLM-R encoders ship ``model.safetensors``, whole or in shards, and no heads; BERT encoders become
XLM-R on the way in. Nothing is unpickled except tensors.
"""

from __future__ import annotations

import logging
import re
import zipfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bge_pruning.model_io import bert_conversion, model_files
from bge_pruning.model_io.hub import (
    encoder_folder,
    fetch_model_folder,
    read_origin,
    refuse_adapter,
    weight_paths,
)
from bge_pruning.model_io.projection import FOLDER, read_projection
from bge_pruning.model_io.tokenizer_files import complete_tokenizer_files
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.utils.json_records import read_record
from bge_pruning.utils.records import PruningRecord

log = logging.getLogger(__name__)
LAYER_NORM = {"gamma": "weight", "beta": "bias"}
EQUAL = 0.3  # weight of a token in a new sparse head, about as large as a trained one's
# State dicts of the sparse and multi-vector heads, ``None`` where there is none.
Heads = dict[str, dict[str, Tensor] | None]


@dataclass
class BaseModel:
    """An unpruned (or extracted) model and what is needed to write another one like it.

    Attributes:
        name: Hub name or folder, as given.
        pruning: Its ``pruning.json`` if it is itself an extracted model.
        prompts: Texts that sentence-transformers writes before an input.
        projection: Map from pooled vectors to the dimensions of the original, which the folder's
            dense vectors have: float32, ``(S, H)``. ``backbone`` and ``heads`` know nothing of it.
        origin: Its hub name, or the one that a local folder names as its base.
    """

    name: str
    shape: EncoderShape
    hf_config: dict[str, Any]
    backbone: XLMRobertaBackbone
    heads: EmbeddingHeads
    tokenizer_files: dict[str, bytes]
    max_seq_length: int
    pruning: PruningRecord | None
    prompts: dict[str, Any]
    projection: Tensor | None = None
    license: str | None = None
    origin: str | None = None

    def dense_size(self) -> int:
        """Size of the dense vectors that the model's folder gives: ``S``, or ``H``."""
        return self.shape.hidden_size if self.projection is None else self.projection.shape[0]


def read_shape(folder: Path, colbert_dim: int | None = None) -> EncoderShape:
    """Sizes of a model folder, from its files, without reading the encoder's weights.

    The ``colbert_dim`` is that of the multi-vector head to be made if the folder has none.

    Raises:
        ValueError: If it is not an encoder that this project can represent.
    """
    refuse_adapter(folder)
    heads = read_heads(folder)
    return model_files.shape_from_config(
        model_files.read_hf_config(folder),
        pooler=_has_pooler(folder),
        sparse_head=heads["sparse_linear"] is not None or colbert_dim is not None,
        colbert_dim=colbert_size(heads) or colbert_dim or 0,
    )


def read_heads(folder: Path) -> Heads:
    """State dicts of the sparse and multi-vector heads, ``None`` where the folder has none."""
    heads: Heads = {}
    for name in ("sparse_linear", "colbert_linear"):
        path = folder / f"{name}.pt"
        state = heads[name] = _load_tensors(path, mapped=False) if path.is_file() else None
        if state is not None and (state.keys() != {"weight", "bias"} or state["weight"].ndim != 2):
            raise ValueError(
                f"{path}: checkpoint and model disagree: the file holds "
                f"{', '.join(sorted(state)) or 'nothing'}, expected weight (out, in) and bias. To "
                f"fix, use the heads that belong to the model."
            )
    return heads


def colbert_size(heads: Heads) -> int:
    """Size of the multi-vectors, 0 without such a head."""
    head = heads["colbert_linear"]
    return 0 if head is None else head["weight"].shape[0]


def load_base_model(
    name: str,
    revision: str | None = None,
    pooling: str | None = None,
    dropout: float = 0.0,
    init_missing_heads: bool = False,
    colbert_dim: int | None = None,
    replace_heads: bool = False,
) -> BaseModel:
    """Load a base model with float32 weights.

    Args:
        pooling: ``"cls"`` or ``"mean"``; ``None`` takes what the folder's sentence-transformers
            files say, else ``"cls"`` as BGE-M3.
        init_missing_heads: Make heads that the folder lacks, see :func:`_with_new_heads`.
            Otherwise those outputs do not exist.
        colbert_dim: Size of a new multi-vector head; ``None`` for the hidden size.
        replace_heads: Make new heads also where the folder has some.

    Raises:
        FileNotFoundError: If a file is missing.
        ForeignModelError: If it is not XLM-R or BERT, has another pooling, or if
            sentence-transformers would apply a module that is not applied here.
        ValueError: If files are damaged or disagree with each other.
        OSError: If the hub cannot deliver the model.
    """
    folder = fetch_model_folder(name, revision)
    projection, pooling = read_projection(folder), pooling or model_files.read_pooling(folder)
    encoder = read_encoder(folder)
    config, state = encoder.config, encoder.state
    _check_projection(folder, projection, config["hidden_size"])
    head_states = read_heads(folder)
    if replace_heads:
        head_states = dict.fromkeys(head_states)
    if init_missing_heads or replace_heads:
        head_states = _with_new_heads(head_states, config["hidden_size"], colbert_dim)
    shape = model_files.shape_from_config(
        config,
        pooler="pooler.dense.weight" in state,
        sparse_head=head_states["sparse_linear"] is not None,
        colbert_dim=colbert_size(head_states),
    )
    backbone, heads = build_modules(shape, config, pooling, dropout)
    load_strict(backbone, state, str(folder))
    encoder.verify(str(folder))
    load_strict(heads, flat_heads(head_states), f"{folder} (heads)")
    _report_heads(name, heads)
    origin, record = read_origin(folder, name), folder / "pruning.json"
    return BaseModel(
        name=name,
        shape=shape,
        hf_config=config,
        backbone=backbone,
        heads=heads,
        tokenizer_files=encoder.tokenizer_files,
        max_seq_length=model_files.read_max_seq_length(folder, config),
        pruning=(
            read_record(record, PruningRecord, "extract the model again")
            if record.is_file()
            else None
        ),
        prompts=model_files.read_prompts(folder),
        projection=projection,
        license=origin.license,
        origin=origin.name,
    )


@dataclass(frozen=True)
class EncoderFiles:
    """The encoder of a folder as XLM-R.

    Attributes:
        config: ``config.json``.
        state: Weights by their names in ``XLMRobertaModel``, float32.
        tokenizer_files: With all special tokens named.
        bert: What the folder holds, if that is BERT.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    tokenizer_files: dict[str, bytes]
    bert: bert_conversion.BertFiles | None = None

    def verify(self, source: str) -> float:
        """Largest difference from the BERT that it was, 0 if it was none."""
        if self.bert is None:
            return 0.0
        tokenizer = self.tokenizer_files["tokenizer.json"]
        return bert_conversion.verify_conversion(
            self.bert, self.config, self.state, tokenizer, source
        )


def read_encoder(folder: Path) -> EncoderFiles:
    """Read weights, config and tokenizer, see :func:`load_base_model`."""
    config = model_files.read_hf_config(folder)
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        read = _load_tensors if path.suffix == ".bin" else model_files.read_safetensors
        state |= _encoder_state(read(path))
    files = model_files.read_tokenizer_files(folder, config["vocab_size"])
    files = complete_tokenizer_files(files, encoder_folder(folder), config["pad_token_id"])
    raw = model_files.read_json(encoder_folder(folder) / "config.json")
    if raw.get("model_type") != "bert":
        return EncoderFiles(config, state, files)
    bert = bert_conversion.BertFiles(raw, state)
    state = bert_conversion.convert_state_dict(state, config["pad_token_id"])
    return EncoderFiles({**config, **model_files.read_edge_ids(files)}, state, files, bert)


def build_modules(
    shape: EncoderShape, config: dict[str, Any], pooling: str, dropout: float = 0.0
) -> tuple[XLMRobertaBackbone, EmbeddingHeads]:
    """Encoder and heads, to be filled with weights by :func:`load_strict`."""
    with without_weights():
        return (
            XLMRobertaBackbone(shape, config["pad_token_id"], config["layer_norm_eps"], dropout),
            EmbeddingHeads(shape.hidden_size, pooling, shape.sparse_head, shape.colbert_dim),
        )


def flat_heads(heads: Heads) -> dict[str, Tensor]:
    """Weights of the heads that are there, under the names of :class:`EmbeddingHeads`."""
    return {f"{n}.{k}": value for n, head in heads.items() for k, value in (head or {}).items()}


def _check_projection(folder: Path, projection: Tensor | None, hidden: int) -> None:
    if projection is not None and projection.shape[1] != hidden:
        raise ValueError(
            f"{folder / FOLDER}: takes vectors of {projection.shape[1]} dimensions, but the "
            f"encoder's have {hidden}. To fix, use the files of the same model."
        )


def without_weights() -> AbstractContextManager:
    """Build modules that take neither memory nor time until :func:`load_strict` fills them.

    Drawing random weights for a model of 568M parameters takes longer than reading it.
    """
    return torch.device("meta")


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Assign the tensors of a state to a module, on any device, in the module's precision.

    They are not copied if their precision is the module's. Where they are parts of a mapped file,
    memory is taken only for what is used, and what is changed never reaches the file: ``torch`` and
    ``safetensors`` map files privately. The state, on the CPU, holds every parameter and buffer of
    the module, and no other.

    Raises:
        ValueError: If the names or shapes differ; the message lists all differences of ``source``.
    """
    expected = module.state_dict()
    only_model = sorted(expected.keys() - state.keys())
    only_source = sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)} in the checkpoint, {tuple(value.shape)} in the model"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if only_model or only_source or shapes:
        parts = [
            f"only in model: {_shorten(only_model)}" if only_model else "",
            f"only in checkpoint: {_shorten(only_source)}" if only_source else "",
            f"shapes: {_shorten(shapes)}" if shapes else "",
        ]
        raise ValueError(
            f"{source}: checkpoint and model disagree: {'; '.join(p for p in parts if p)}. To "
            f"fix, use the weights and the config of the same model."
        )
    own = {key: value.to(expected[key].dtype).contiguous() for key, value in state.items()}
    module.load_state_dict(own, assign=True)


def _shorten(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the encoder's weights: one, or its shards."""
    paths = weight_paths(encoder_folder(folder))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor the index of "
            f"their shards. To fix, choose a folder that holds a model's weights."
        )
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{folder}: lacks {_shorten(missing)} of {len(paths)} shards. To fix, copy all of them."
        )
    return paths


def _has_pooler(folder: Path) -> bool:
    """Whether the weights hold a pooler."""
    names: list[str] = []
    for path in weight_files(folder):
        try:
            if path.suffix == ".bin":
                names += _load_tensors(path)
            else:
                with safe_open(path, "pt") as file:
                    names += file.keys()
        except SafetensorError as error:
            raise model_files.damaged(path, error) from error
    return "pooler.dense.weight" in {_encoder_name(name) for name in names}


def _load_tensors(path: Path, mapped: bool = True) -> dict[str, Tensor]:
    try:
        # Files of the old format are not zip archives and cannot be mapped.
        mmap = mapped and zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path}: damaged, not complete, or not only tensors ({describe_load_error(error)}). "
            f"To fix, copy it again."
        ) from error
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: not only tensors by name. To fix, copy it again.")
    return state


def describe_load_error(error: Exception) -> str:
    """Describe an error in torch's words, without its advice to allow code."""
    text = str(error).strip()
    found = re.search(r"(?:WeightsUnpickler error: |(?=Trying to load ))(.*)", text)
    reason = found.group(1) if found else text.partition("\n")[0]
    reason = re.sub(r"<class '([^']*)'>", r"\1", reason)
    return reason if reason and "weights_only" not in reason else type(error).__name__


def _encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoder weights under the names of ``XLMRobertaModel``.

    Checkpoints of a language model prefix them with ``roberta.`` and carry its output layer; old
    ones also carry index buffers.
    """
    prefixes = ("embeddings.", "encoder.", "pooler.")
    names = {key: _encoder_name(key) for key in state}
    buffers = {"embeddings.position_ids", "embeddings.token_type_ids"}
    return {
        name: state[key].float()
        for key, name in names.items()
        if name.startswith(prefixes) and name not in buffers
    }


def _encoder_name(key: str) -> str:
    name = re.sub(r"^(roberta|xlm_roberta|bert|model)\.", "", key)
    # Google's names, which old BERT files have.
    return re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: LAYER_NORM[m[0]], name)


def _with_new_heads(states: Heads, hidden: int, colbert_dim: int | None) -> Heads:
    """Add the heads that are missing, as far as they are useful without training.

    The sparse head weighs all tokens alike, so that its score counts common tokens. The
    multi-vector head is the identity, or of another size random.
    """
    size = colbert_dim or hidden
    random = torch.randn(size, hidden, generator=torch.Generator().manual_seed(0)) / hidden**0.5
    vectors = torch.eye(hidden) if size == hidden else random
    new = {
        "sparse_linear": {"weight": torch.zeros(1, hidden), "bias": torch.full((1,), EQUAL)},
        "colbert_linear": {"weight": vectors, "bias": torch.zeros(size)},
    }
    for name, state in states.items():
        if state is None:
            log.warning("%s: not in the base model, initialised (it needs training)", name)
    return {name: states[name] or new[name] for name in new}


def _report_heads(name: str, heads: EmbeddingHeads) -> None:
    missing = [k for k in ("sparse_linear", "colbert_linear") if getattr(heads, k) is None]
    if missing:
        log.warning(
            "%s has no %s: only the remaining outputs exist (model.init_missing_heads=true makes "
            "new heads)",
            name,
            " and no ".join(f"{m}.pt" for m in missing),
        )
