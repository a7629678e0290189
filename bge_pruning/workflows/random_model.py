"""Models of random weights, for measurements at any size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count, islice, product
from typing import Any

import torch

from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PAD = 1
MARK = "▁"  # stands for the space before a word
SYLLABLES = ["".join(pair) for pair in product("bcdfghjklmnpqrstvwxz", "aeiou")]


def random_base_model(
    shape: EncoderShape, name: str, words: Sequence[str] = (), seed: int = 0
) -> BaseModel:
    """A model of random weights that was never on a disk.

    Args:
        shape: Sizes of the model.
        name: Its name, for messages.
        words: Words that get a token of their own, so that texts of them have a natural length.
        seed: Seed of the weights.
    """
    positions = shape.max_position_embeddings - PAD - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = XLMRobertaBackbone(shape, PAD)
        heads = EmbeddingHeads(shape.hidden_size, "cls", shape.sparse_head, shape.colbert_dim)
    return BaseModel(
        name=name,
        shape=shape,
        hf_config=_hf_config(shape),
        backbone=backbone,
        heads=heads,
        tokenizer_files=make_tokenizer_files(shape.vocab_size, positions, words),
        max_seq_length=positions,
        pruning=None,
        prompts={},
    )


def _hf_config(shape: EncoderShape) -> dict[str, Any]:
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    tables = ("vocab_size", "max_position_embeddings", "type_vocab_size")
    return {
        **{key: getattr(shape, key) for key in (*sizes, *tables)},
        "model_type": "xlm-roberta",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": PAD,
        "eos_token_id": 2,
    }


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
