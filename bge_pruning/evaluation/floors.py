"""Two floors that a pruned model must clear before its score means anything.

An untrained encoder, and the words of the texts without any encoder, already reach a good part of a
trained model's score: tokens in common alone can reach as much as a sparse head. Only the part
*above* the larger of the two was kept by pruning.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.evaluation.text_encoder import ALONE, BatchEncoder, Encoder
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.embedding_heads import OUTPUT_NAMES

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
                # Drawn on the CPU: the floor is the same on every device.
                module.weight.copy_(torch.empty(module.weight.shape).normal_(std=INIT_STD))
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0)  # the weight of a LayerNorm
    return replace(base, backbone=backbone, heads=heads)


class WordEmbeddings(BatchEncoder):
    """What the words of a text give without any layer; special tokens are left out.

    * dense: the normalised mean of their embeddings;
    * sparse: weight 1 for each, so that a score is the number of tokens in common;
    * multi-vectors: their normalised embeddings.

    Texts get no prompt. One without any known token has vectors of zeros.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.name, self.device, self.ranks = "word embeddings", "cpu", ALONE
        self.batch_size, self.prompts = encoder.batch_size, {}
        self._given = encoder
        table = torch.from_numpy(encoder.word_table())
        self._table = torch.cat([table, table.new_zeros(1, table.shape[1])])
        self.vocab_size, self.dense_size = self._table.shape
        self.pad_token_id = len(table)  # the row of zeros
        self.special_ids = [self.pad_token_id]

    def names(self) -> tuple[str, ...]:
        """All outputs."""
        return tuple(OUTPUT_NAMES.values())

    def word_table(self) -> np.ndarray:
        """Word embeddings and a row of zeros, shape ``(V + 1, H)``."""
        return self._table.numpy()

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """The words of texts, each after one special token: the first has no multi-vector."""
        tokens = self._given.tokenize(texts)
        words = ~np.isin(tokens.ids, self._given.special_ids)
        counts = np.bincount(np.repeat(np.arange(len(tokens)), tokens.lengths)[words])
        counts = np.pad(counts, (0, len(tokens) - len(counts)))
        starts = np.concatenate([[0], np.cumsum(1 + counts.clip(min=1))])
        places = np.ones(starts[-1], bool)
        places[starts[:-1]] = places[starts[:-1][counts == 0] + 1] = False
        ids = np.full(starts[-1], self.pad_token_id, np.int32)
        ids[places] = tokens.ids[words]
        return TokenizedTexts(ids, starts, tokens.truncated)

    def compute(self, ids: Tensor, mask: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of one batch by name, see :class:`BatchEncoder`."""
        vectors = self._table[ids]
        outputs = {
            "dense_vecs": lambda: F.normalize(vectors.sum(1), dim=-1),
            "token_weights": mask.float,
            "colbert_vecs": lambda: F.normalize(vectors[:, 1:], dim=-1),
        }
        return {name: outputs[name]() for name in names}
