"""Models and runs of random weights, for measurements at any size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.checkpoint import METADATA_KEY, RunMetadata, build_l0_module
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.pretrained import BaseModel

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PAD = 1
MARK = "▁"  # stands for the space before a word
SYLLABLES = ["".join(pair) for pair in product("bcdfghjklmnpqrstvwxz", "aeiou")]


def write_random_run(
    folder: Path,
    shape: EncoderShape,
    l0_module: dict[str, Any] | None,
    words: Sequence[str] = (),
    with_optimizer: bool = False,
    seed: int = 0,
) -> Path:
    """Write the checkpoint of a run that never happened.

    Args:
        folder: Run folder to make.
        shape: Sizes of the model.
        l0_module: Arguments of its gates, see :attr:`RunMetadata.l0_module`.
        words: Words that get a token of their own, so that texts of them have a natural length.
        with_optimizer: Add AdamW's two moments, as a checkpoint has them without
            ``save_weights_only``.
        seed: Seed of the weights.

    Returns:
        The checkpoint.
    """
    modules = _random_modules(shape, seed)
    modules["l0_module"] = build_l0_module(shape, l0_module)
    weights = {
        f"{prefix}.{name}": tensor
        for prefix, module in modules.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }
    metadata = _metadata(shape, l0_module, words, seed)
    content = {
        "model": weights,
        "callbacks": [(METADATA_KEY, metadata.state_dict())],
        "timestamp": {"Timestamp": {"epoch": 0, "batch": 1}},
    }
    if with_optimizer:
        content["optimizers"] = {"AdamW": {"state": _moments(weights), "param_groups": []}}
    folder.mkdir(parents=True)
    torch.save({"state": content}, folder / "latest-rank0.pt")
    return folder / "latest-rank0.pt"


def random_base_model(
    shape: EncoderShape, name: str, words: Sequence[str] = (), seed: int = 0
) -> BaseModel:
    """A model of random weights that was never on a disk.

    Args:
        shape: Sizes of the model.
        name: Its name, for messages.
        words: See :func:`write_random_run`.
        seed: Seed of the weights.
    """
    modules = _random_modules(shape, seed)
    metadata = _metadata(shape, None, words, seed)
    return BaseModel(
        name=name,
        shape=shape,
        hf_config=metadata.hf_config,
        backbone=modules["backbone"],
        heads=modules["heads"],
        tokenizer_files=metadata.tokenizer_files,
        max_seq_length=metadata.max_seq_length,
        pruning=None,
        prompts={},
    )


def _random_modules(shape: EncoderShape, seed: int) -> dict[str, nn.Module | None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            "backbone": XLMRobertaBackbone(shape, PAD),
            "heads": EmbeddingHeads(shape.hidden_size, "cls", shape.sparse_head, shape.colbert_dim),
        }


def _moments(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {"step": torch.ones(()), "exp_avg": 0.1 * value, "exp_avg_sq": value * value}
        for name, value in weights.items()
    }


def _metadata(
    shape: EncoderShape, l0_module: dict[str, Any] | None, words: Sequence[str], seed: int
) -> RunMetadata:
    positions = shape.max_position_embeddings - PAD - 1
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    tables = ("vocab_size", "max_position_embeddings", "type_vocab_size")
    return RunMetadata(
        base_model="random weights",
        shape=asdict(shape),
        hf_config={
            **{key: getattr(shape, key) for key in (*sizes, *tables)},
            "model_type": "xlm-roberta",
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "bos_token_id": 0,
            "pad_token_id": PAD,
            "eos_token_id": 2,
        },
        pooling="cls",
        max_seq_length=positions,
        seed=seed,
        l0_module=l0_module,
        source_pruning=None,
        versions={"torch": torch.__version__},
        tokenizer_files=make_tokenizer_files(shape.vocab_size, positions, words),
    )


def make_tokenizer_files(size: int, max_length: int, words: Sequence[str]) -> dict[str, bytes]:
    """A Unigram tokenizer in XLM-R's layout, of made-up pieces; indented as the real one is.

    Args:
        size: Number of tokens, special ones included.
        max_length: Longest text in tokens.
        words: Words that are pieces.
    """
    pieces = list(islice(_pieces(words), size - len(SPECIAL) - 1))
    scored = [[piece, -8.0 - rank / 30011] for rank, piece in enumerate(pieces)]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": index, "content": token, **special, "special": True}
        for index, token in [*enumerate(SPECIAL), (size - 1, "<mask>")]
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always"},
            ],
        },
        "post_processor": _post_processor(),
        "decoder": {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always"},
        "model": {
            "type": "Unigram",
            "unk_id": 3,
            "vocab": [[token, 0.0] for token in SPECIAL] + scored + [["<mask>", 0.0]],
            "byte_fallback": False,
        },
    }
    names = {"bos": 0, "cls": 0, "eos": 2, "sep": 2, "pad": PAD, "unk": 3}
    config = {
        **{f"{name}_token": SPECIAL[index] for name, index in names.items()},
        "mask_token": "<mask>",
        "model_max_length": max_length,
        "tokenizer_class": "XLMRobertaTokenizer",
    }
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    return {
        name: json.dumps(content, ensure_ascii=False, indent=2).encode()
        for name, content in files.items()
    }


def _post_processor() -> dict[str, Any]:
    def token(index: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": SPECIAL[index], "type_id": 0}}

    def text(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    return {
        "type": "TemplateProcessing",
        "single": [token(0), text("A"), token(2)],
        "pair": [token(0), text("A"), token(2), token(2), text("B"), token(2)],
        "special_tokens": {
            SPECIAL[i]: {"id": SPECIAL[i], "ids": [i], "tokens": [SPECIAL[i]]} for i in (0, 2)
        },
    }


def _pieces(words: Sequence[str]) -> Iterator[str]:
    """Pieces without end, none twice: words, letters, then ever longer made-up words."""
    first = [MARK + word for word in words] + [MARK, *map(chr, range(33, 127))]
    yield from dict.fromkeys(first)
    known = set(first)
    for length in count(1):
        for syllables in product(SYLLABLES, repeat=length):
            for piece in (MARK + "".join(syllables), "".join(syllables)):
                if piece not in known:
                    yield piece
