"""Write an ordinary XLM-R model folder, in a precision, that other tools load without this package.

The library's own writer takes all tensors at once, so rounding to half precision would take half as
much memory again as the model.

Rounding to nearest changes a weight by its unit roundoff at most, relative to itself: 2^-11 (0.05
%) in float16 and 2^-8 (0.4 %) in bfloat16. float16 loses more below 2^-14 (its steps are 2^-24
there) and ends at 65504; bfloat16 has float32's range. How far that moves an output depends on the
model, so it is measured, not bounded. What can be exact is: a model that was rounded in memory and
one that was written and read back have the same float32 weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bge_pruning.model_io.model_files import find_prompt
from bge_pruning.model_io.projection import compute_modules, write_projection
from bge_pruning.model_io.tokenizer_files import write_for_tools
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape

# Precisions by their names on the command line.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCK = 1 << 22  # numbers that are worked on at a time
# torch's types by the names of the safetensors format.
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Readers map the file, so alignment in the file is alignment in memory. The format demands 8.
ALIGNMENT = 64


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``, as ``config.json`` has it."""
    return str(dtype).removeprefix("torch.")


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a precision that no model is written in."""
    if dtype not in DTYPES.values():
        raise ValueError(
            f"dtype {dtype} is not one of {', '.join(map(str, DTYPES.values()))}. To fix, choose "
            f"one: {', '.join(DTYPES)}."
        )


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Flat views of the pieces of a contiguous tensor: working on them takes little memory."""
    yield from tensor.detach().view(-1).split(BLOCK)


def round_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor to a precision; a tensor that has it is returned as it is."""
    check_dtype(dtype)
    if tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    # A sum is one quick pass, and hardly ever anything but finite.
    if rounded.sum(dtype=torch.float32).isfinite():
        return rounded
    if bool((rounded.isinf() & tensor.isfinite()).any()):
        largest = tensor[tensor.isfinite()].abs().max()
        raise ValueError(
            f"{name} holds {largest:g}, and {dtype_name(dtype)} ends at "
            f"{torch.finfo(dtype).max:g}. To fix, write the model in bf16 or fp32."
        )
    return rounded


@torch.no_grad()
def round_weights(backbone: XLMRobertaBackbone, heads: EmbeddingHeads, dtype: torch.dtype) -> None:
    """Round all weights in place; they stay float32 tensors.

    Rounding weight by weight and cutting rows and columns can be done in either order.
    """
    for module in (backbone, heads):
        for name, parameter in module.named_parameters():
            for block in blocks(parameter):
                block.copy_(round_tensor(name, block, dtype))


def precision_loss(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """How far rounding moved the float32 outputs.

    Returns ``dense_cosine``, the lowest cosine of a text's two dense vectors; and the largest
    difference of every output under its name.
    """
    cosine = torch.cosine_similarity(before["dense_vecs"], after["dense_vecs"], dim=-1)
    differences = {name: float((after[name] - before[name]).abs().max()) for name in before}
    return {"dense_cosine": float(cosine.min()), **differences}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write tensors one after the other.

    Raises:
        FileExistsError: If the file exists; somebody may have mapped it.
        ValueError: If the precision is unknown, or a number is beyond its range.
    """
    check_dtype(dtype)
    with path.open("xb") as file:
        file.write(_header(tensors, dtype))
        for name, tensor in tensors.items():
            for block in blocks(tensor.contiguous()):
                file.write(round_tensor(name, block, dtype).view(torch.uint8).numpy())


def _header(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bytes:
    """Length in 8 bytes, then names, shapes and offsets as JSON, padded with spaces."""
    content: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + dtype.itemsize * tensor.numel()
        shape = list(tensor.shape)
        content[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


# Keys that name the source or the way it was saved, not the model.
_STALE_KEYS = ("_name_or_path", "torch_dtype", "dtype", "transformers_version", "head_dim")
# Keys that text-embeddings-inference needs and transformers has defaults for.
_DEFAULTS = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
}


def write_model_folder(
    folder: Path,
    backbone: XLMRobertaBackbone,
    heads: EmbeddingHeads,
    shape: EncoderShape,
    hf_config: dict[str, Any],
    tokenizer_files: dict[str, bytes],
    max_seq_length: int,
    prompts: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    projection: Tensor | None = None,
) -> None:
    """Write weights, config, tokenizer, heads and sentence-transformers files.

    Heads have the precision of the encoder. FlagEmbedding copies them into layers of its own, so it
    loads any precision with ``use_fp16`` or without.
    """
    tokenizer_files = write_for_tools(tokenizer_files, max_seq_length)
    for name, content in tokenizer_files.items():
        (folder / name).write_bytes(content)
    if "special_tokens_map.json" not in tokenizer_files:
        _write_json(folder / "special_tokens_map.json", _special_tokens(tokenizer_files))
    _write_json(folder / "config.json", compute_hf_config(hf_config, shape, dtype))
    write_safetensors(folder / "model.safetensors", backbone.state_dict(), dtype)
    for name in ("colbert_linear", "sparse_linear"):
        head = getattr(heads, name)
        if head is not None:
            torch.save(_rounded(head, dtype, f"{name}."), folder / f"{name}.pt")
    write_sentence_transformers_files(
        folder, heads.pooling, shape.hidden_size, max_seq_length, prompts, projection
    )


def _rounded(module: nn.Module, dtype: torch.dtype, prefix: str = "") -> dict[str, Tensor]:
    return {
        name: round_tensor(prefix + name, value.detach(), dtype).contiguous()
        for name, value in module.state_dict().items()
    }


def compute_hf_config(
    hf_config: dict[str, Any], shape: EncoderShape, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Build ``config.json`` of the cut model from its source's: new sizes and precision."""
    kept = {key: value for key, value in hf_config.items() if key not in _STALE_KEYS}
    return {
        **_DEFAULTS,
        **kept,
        "architectures": ["XLMRobertaModel"],
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        # Older vLLM reads this key without a default.
        "position_embedding_type": "absolute",
        # transformers 5 loads a model in this precision; older readers know the second name.
        "dtype": dtype_name(dtype),
        "torch_dtype": dtype_name(dtype),
    }


def _special_tokens(tokenizer_files: dict[str, bytes]) -> dict[str, Any]:
    config = json.loads(tokenizer_files["tokenizer_config.json"])
    return {
        key: value
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, (str, dict))
    }


def write_sentence_transformers_files(
    folder: Path,
    pooling: str,
    hidden_size: int,
    max_seq_length: int,
    prompts: dict[str, Any] | None = None,
    projection: Tensor | None = None,
) -> None:
    """Write the classic layout, which sentence-transformers and text-embeddings-inference read.

    By hand: ``SentenceTransformer.save`` writes a newer format that lacks keys which
    text-embeddings-inference needs. Without these files sentence-transformers silently takes the
    mean of the tokens. Texts are cut to ``max_seq_length`` tokens, special ones included. The
    projection, ``(S, H)``, maps pooled vectors to those that are normalised.
    """
    modules = compute_modules(projection is not None)
    _write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir()
    if projection is not None:
        write_projection(folder, projection)
    normalize = folder / modules[-1]["path"]
    normalize.mkdir()
    # Some tools drop empty folders on upload, but need this one.
    _write_json(normalize / "config.json", {})
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": hidden_size,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    length = {"max_seq_length": max_seq_length, "do_lower_case": False}
    _write_json(folder / "sentence_bert_config.json", length)
    texts = {"prompts": {}, "default_prompt_name": None, **(prompts or {})}
    if passage := find_prompt(texts, "passage"):  # the only name of it that mteb knows
        texts["prompts"] = {**texts["prompts"], "document": passage}
    _write_json(
        folder / "config_sentence_transformers.json", {**texts, "similarity_fn_name": "cosine"}
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
