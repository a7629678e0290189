"""Two floors that a pruned model must clear before its score means anything.

An untrained encoder, and a table of word vectors without any encoder, already reach a good part of
a trained model's score. Only the part *above* the larger of the two was kept by pruning.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from bge_pruning.evaluation.text_encoder import Encoded, Encoder
from bge_pruning.model_io.pretrained import BaseModel

# Standard deviation of a new model's weights in transformers.
INIT_STD = 0.02


def with_random_weights(base: BaseModel, seed: int) -> BaseModel:
    """Make a model of the same shape, initialised as ``transformers`` does, heads included.

    The projection is kept, because it determines which dimensions the vectors have. The caller's
    random state is restored.
    """
    backbone, heads = copy.deepcopy(base.backbone), copy.deepcopy(base.heads)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in (*backbone.modules(), *heads.modules()):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0)  # the weight of a LayerNorm
    return replace(base, backbone=backbone, heads=heads)


class WordEmbeddings:
    """The normalised mean of a text's word embeddings, without special tokens or any layer."""

    def __init__(self, encoder: Encoder) -> None:
        self.prompts: dict[str, str] = {}
        self._tokenize = encoder.tokenize
        self._table = encoder.word_table()
        special = [index for index in encoder.special_ids if index < len(self._table)]
        self._table[special] = 0.0  # does not change the direction of a mean

    def names(self) -> tuple[str, ...]:
        """Return the only output, dense vectors."""
        return ("dense_vecs",)

    def encode(
        self, texts: Sequence[str], names: Sequence[str] = ("dense_vecs",), progress: bool = False
    ) -> Encoded:
        """Dense vectors of texts; a text without any known token gets the zero vector."""
        tokens = self._tokenize(texts)
        vectors = np.zeros((len(tokens), self._table.shape[1]), np.float32)
        for row in range(len(tokens)):
            vectors[row] = self._table[tokens[row]].sum(axis=0)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return Encoded(vectors / np.maximum(lengths, 1e-12), None, tokens.truncated)
