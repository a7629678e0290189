"""The frozen model that a student is distilled from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.hub import fetch_model_folder
from bge_pruning.models.model_files import (
    read_hf_config,
    read_pooling,
    read_tokenizer_files,
    read_vocabulary,
)
from bge_pruning.models.pretrained import load_base_model, weight_file


class FrozenEncoder:
    """The unpruned model, embedding texts without gradient.

    Args:
        backbone: Its encoder; set to evaluation mode and frozen.
        heads: Its heads.
    """

    def __init__(self, backbone: XLMRobertaBackbone, heads: EmbeddingHeads) -> None:
        self.backbone = backbone.eval().requires_grad_(False)
        self.heads = heads

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Dense vectors, shape ``(B, H)``, on the device of the input."""
        self.backbone.to(input_ids.device)
        return self.heads.dense_vecs(self.backbone(input_ids, attention_mask), attention_mask)


class Teacher:
    """The model to distil from, loaded only when its vectors are not cached.

    Args:
        name: Hub name or folder.
        revision: Hub revision.
        pooling: Pooling of the dense output; ``None`` takes what the model's files say.
    """

    def __init__(self, name: str, revision: str | None, pooling: str | None) -> None:
        self.name = name
        self.revision = revision
        self.pooling = pooling
        self._encoder: FrozenEncoder | None = None

    def encoder(self) -> FrozenEncoder:
        """The frozen model."""
        if self._encoder is None:
            model = load_base_model(self.name, self.revision, self.pooling)
            self._encoder = FrozenEncoder(model.backbone, model.heads)
        return self._encoder

    def hidden_size(self) -> int:
        """Size of its vectors."""
        return read_hf_config(fetch_model_folder(self.name, self.revision))["hidden_size"]

    def vocabulary(self) -> dict[str, int]:
        """Id of every token of its tokenizer."""
        folder = fetch_model_folder(self.name, self.revision)
        vocab_size = read_hf_config(folder)["vocab_size"]
        return read_vocabulary(read_tokenizer_files(folder, vocab_size))

    def fingerprint(self) -> str:
        """Hash of all that its vectors depend on: weights, sizes and pooling."""
        folder = fetch_model_folder(self.name, self.revision)
        weights, config = weight_file(folder), read_hf_config(folder)
        numbers = {k: v for k, v in sorted(config.items()) if isinstance(v, (int, float))}
        digest = hashlib.sha256(f"{self.pooling or read_pooling(folder)} {numbers}".encode())
        with weights.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        return digest.hexdigest()
