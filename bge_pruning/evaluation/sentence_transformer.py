"""Models that are no XLM-R encoders, such as rivals to compare with: dense vectors alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from bge_pruning.datasets.embedding_dataset import TokenizedTexts, build_tokenizer, tokenize
from bge_pruning.evaluation.text_encoder import Encoded, check_finite
from bge_pruning.model_io.quiet import no_loading_bars

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

# What a model without a limit of its own reads.
LONGEST = 8192


class SentenceTransformerEncoder:
    """Any transformer that sentence-transformers loads.

    Args:
        model: The model.
        name: Its folder or hub name.
        max_length: Longest text in tokens; ``None`` for the model's own limit.
        batch_size: Texts of a batch.

    Raises:
        ValueError: If it has no transformer inside, so that there is no shape to make floors of.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        name: str,
        max_length: int | None = None,
        batch_size: int = 64,
    ) -> None:
        if model.transformers_model is None:
            raise ValueError(
                f"{name}: {type(model[0]).__name__} is not a transformer. To fix, give a model "
                f"whose modules.json starts with a Transformer."
            )
        self.model, self.name = model.eval(), name
        self.device = str(model.device)
        self.batch_size = batch_size
        own = model.max_seq_length or LONGEST
        self.max_length = model.max_seq_length = min(max_length or own, own)
        self.prompts = dict(model.prompts or {})
        self.special_ids = sorted(model.tokenizer.all_special_ids)
        file = model.tokenizer.backend_tokenizer.to_str().encode()
        self._tokenizer = build_tokenizer(file, self.max_length)

    def names(self) -> tuple[str, ...]:
        """Dense vectors alone."""
        return ("dense_vecs",)

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Token ids of texts."""
        return tokenize(texts, self._tokenizer)

    def word_table(self) -> np.ndarray:
        """Word embeddings, shape ``(V, H)``."""
        table = self.transformer().get_input_embeddings().weight
        return table.detach().float().cpu().numpy().copy()

    def transformer(self) -> PreTrainedModel:
        """The Hugging Face model inside."""
        return self.model.transformers_model

    def encode(
        self, texts: Sequence[str], names: Sequence[str] = ("dense_vecs",), progress: bool = False
    ) -> Encoded:
        """Normalised dense vectors of texts.

        Raises:
            ValueError: If a vector is not finite.
        """
        vectors = self.model.encode(
            list(texts),
            batch_size=self.batch_size,
            show_progress_bar=progress,
            normalize_embeddings=True,
            prompt="",  # the texts come with theirs
        )
        check_finite({"dense_vecs": torch.from_numpy(vectors)}, self.name)
        return Encoded(vectors, None, self.tokenize(texts).truncated)

    def count_parameters(self) -> dict[str, int]:
        """Parameters by part, as :func:`bge_pruning.utils.model_analysis.count_parameters`."""
        counts = dict.fromkeys(("encoder", "embeddings", "pooler", "heads"), 0)
        inside = {id(parameter) for parameter in self.transformer().parameters()}
        for name, parameter in self.transformer().named_parameters():
            part = next((p for p in ("embeddings", "pooler") if p in name), "encoder")
            counts[part] += parameter.numel()
        counts["heads"] = sum(p.numel() for p in self.model.parameters() if id(p) not in inside)
        return {**counts, "total": sum(counts.values())}

    def untrained(self, seed: int) -> SentenceTransformerEncoder:
        """A model of the same shape with the weights that ``transformers`` gives a new one."""
        from sentence_transformers import SentenceTransformer

        with no_loading_bars():
            model = SentenceTransformer(self.name, device=self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trained = self.transformer()
            model[0].model = type(trained)(trained.config).to(self.device)
        return SentenceTransformerEncoder(model, self.name, self.max_length, self.batch_size)
