"""The teacher as a model folder, loaded when its outputs are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.model_io import model_files, pretrained
from bge_pruning.model_io.hub import fetch_model_folder
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.teacher import FrozenEncoder


class Teacher:
    """The model to distil from, loaded only when its vectors are not cached.

    Its vectors are those of its encoder, before any projection: students have the encoder's
    dimensions, or fewer of them. Where the projection is a selection, similarities are the same.

    Args:
        pooling: Pooling of the dense output; ``None`` takes what the model's files say.
        model: It, where it is in memory: an encoder that stays as it is. Its heads are trained.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        pooling: str | None,
        names: Sequence[str] = ("dense_vecs",),
        model: pretrained.BaseModel | None = None,
    ) -> None:
        self.name = name
        self.names = tuple(names)
        self.revision = revision
        self.pooling = pooling
        self.model = model
        self._encoder: FrozenEncoder | None = None
        self._fingerprint: str | None = None

    def encoder(self) -> FrozenEncoder:
        """The frozen model."""
        if self._encoder is None:
            model = self.model
            if model is None:
                model = pretrained.load_base_model(self.name, self.revision, self.pooling)
                heads = model.heads
            else:
                heads = EmbeddingHeads(model.shape.hidden_size, model.heads.pooling, False, 0)
            self._encoder = FrozenEncoder(model.backbone, heads, self.names)
        return self._encoder

    def release(self) -> None:
        """Forget the model, which takes memory on the device; it is loaded again if needed."""
        self._encoder = None

    def hidden_size(self) -> int:
        """Size of its vectors."""
        return model_files.read_hf_config(self._folder())["hidden_size"]

    def vocabulary(self) -> dict[str, int]:
        """Id of every token of its tokenizer."""
        vocab_size = model_files.read_hf_config(self._folder())["vocab_size"]
        files = model_files.read_tokenizer_files(self._folder(), vocab_size)
        return model_files.read_vocabulary(files)

    def prompts(self) -> list[str]:
        """What its files say is written before a query, a passage and another text."""
        prompts = model_files.read_prompts(self._folder())
        return [model_files.find_prompt(prompts, role) for role in model_files.PROMPT_NAMES]

    def colbert_dim(self) -> int:
        """Size of its multi-vectors, 0 if it has none."""
        return pretrained.colbert_size(pretrained.read_heads(self._folder()))

    def _folder(self) -> Path:
        return fetch_model_folder(self.name, self.revision)

    def find_mismatch(self, student: pretrained.BaseModel) -> str | None:
        """Explain why it cannot teach a model; ``None`` if it can.

        An extracted model has the tokens and multi-vectors of its source, unless asked otherwise.
        """
        if self.vocabulary() != model_files.read_vocabulary(student.tokenizer_files):
            return (
                f"teacher '{self.name}' and {student.name} have different tokenizers: the same ids "
                f"mean other words to it. To fix, set teacher.base_model to a model with the "
                f"tokenizer of {student.name}, such as itself, or train a model with all tokens "
                f"and trim the vocabulary when the trained one is extracted."
            )
        size, own = self.colbert_dim(), student.shape.colbert_dim
        if "colbert_vecs" in self.names and size and own and size != own:
            return (
                f"teacher '{self.name}' has multi-vectors of {size} dimensions, {student.name} of "
                f"{own}, so they cannot be compared. To fix, set loss.distillation_colbert=0, or "
                f"train a model that was extracted without --colbert-dim hidden."
            )
        return None

    def fingerprint(self) -> str:
        """Hash of all that its outputs depend on: weights, heads, sizes and pooling.

        The weights are read once, however many sources ask.
        """
        if self._fingerprint is None:
            self._fingerprint = self._hash()
        return self._fingerprint

    def _hash(self) -> str:
        folder = self._folder()
        weights, config = pretrained.weight_files(folder), model_files.read_hf_config(folder)
        numbers = {k: v for k, v in sorted(config.items()) if isinstance(v, (int, float))}
        pooling = self.pooling or model_files.read_pooling(folder)
        digest = hashlib.sha256(f"{pooling} {numbers}".encode())
        heads = [folder / f"{name}.pt" for name in ("sparse_linear", "colbert_linear")]
        for path in [*weights, *(path for path in heads if path.is_file())]:
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()
