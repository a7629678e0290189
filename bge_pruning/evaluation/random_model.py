"""Build models of random weights, to measure any size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count, islice, product
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing

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
    """Build a model of random weights in memory; ``name`` is for messages.

    The words get a token of their own, so that texts of them have a natural length.
    """
    positions = shape.max_position_embeddings - PAD - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = XLMRobertaBackbone(shape, PAD)
        heads = EmbeddingHeads(shape.hidden_size, "cls", shape.sparse_head, shape.colbert_dim)
    files = make_tokenizer_files(shape.vocab_size, positions, words)
    return BaseModel(
        name, shape, _hf_config(shape), backbone, heads, files, positions, pruning=None, prompts={}
    )


def _hf_config(shape: EncoderShape) -> dict[str, Any]:
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    tables = ("vocab_size", "max_position_embeddings", "type_vocab_size")
    special = {"bos_token_id": 0, "pad_token_id": PAD, "eos_token_id": 2}
    fixed = {"model_type": "xlm-roberta", "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    return {key: getattr(shape, key) for key in (*sizes, *tables)} | fixed | special


def make_tokenizer_files(size: int, max_length: int, words: Sequence[str]) -> dict[str, bytes]:
    """Make a Unigram tokenizer of ``size`` tokens in XLM-R's layout: words and made-up pieces."""
    pieces = islice(_pieces(words), size - len(SPECIAL) - 1)
    scored = [(piece, -8.0 - rank / 30011) for rank, piece in enumerate(pieces)]
    vocabulary = [(token, 0.0) for token in SPECIAL] + scored + [("<mask>", 0.0)]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=3, byte_fallback=False))
    metaspace = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement=MARK, prepend_scheme="always")
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (*SPECIAL, "<mask>")])
    names = {"bos": 0, "cls": 0, "eos": 2, "sep": 2, "pad": PAD, "unk": 3}
    config = {
        **{f"{name}_token": SPECIAL[index] for name, index in names.items()},
        "mask_token": "<mask>",
        "model_max_length": max_length,
        "tokenizer_class": "XLMRobertaTokenizer",
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
    }


def _pieces(words: Sequence[str]) -> Iterator[str]:
    """Yield distinct pieces without end: words, letters, then ever longer made-up words."""
    first = [MARK + word for word in words] + [MARK, *map(chr, range(33, 127))]
    yield from dict.fromkeys(first)
    known = set(first)
    for length in count(1):
        for syllables in product(SYLLABLES, repeat=length):
            for piece in (MARK + "".join(syllables), "".join(syllables)):
                if piece not in known:
                    yield piece
