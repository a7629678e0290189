"""Build models of random weights, to measure any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice, product
from typing import Any

import torch

from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.model_io.tokenizer_files import META, make_unigram_files
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PAD = 1
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
    special = [(token, 0.0) for token in SPECIAL]
    return make_unigram_files([*special, *scored, ("<mask>", 0.0)], max_length)


def _pieces(words: Sequence[str]) -> Iterator[str]:
    """Yield distinct pieces without end: words, letters, then ever longer made-up words."""
    first = [META + word for word in words] + [META, *map(chr, range(33, 127))]
    yield from dict.fromkeys(first)
    known = set(first)
    for length in count(1):
        for syllables in product(SYLLABLES, repeat=length):
            for piece in (META + "".join(syllables), "".join(syllables)):
                if piece not in known:
                    yield piece
