"""Models to evaluate, by name: folders, checkpoints of a run, ONNX files, hub names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bge_pruning.datasets.embedding_dataset import TokenizedTexts, build_tokenizer, tokenize
from bge_pruning.evaluation.floors import with_random_weights
from bge_pruning.evaluation.onnx_encoder import OnnxEncoder, find_model_folder
from bge_pruning.evaluation.text_encoder import Encoded, TextEncoder, check_finite
from bge_pruning.model_io import checkpoint
from bge_pruning.model_io.hub import (
    encoder_folder,
    fetch_model_folder,
    no_loading_bars,
    refuse_adapter,
)
from bge_pruning.model_io.model_files import (
    ForeignModelError,
    check_prompts_are_pooled,
    read_json,
)
from bge_pruning.model_io.pretrained import BaseModel, load_base_model, read_shape
from bge_pruning.model_io.projection import read_projection
from bge_pruning.models.encoder_shape import count_parameters as count_shape

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel


# Longest text, in tokens, of a model without a limit of its own.
LONGEST = 8192


class SentenceTransformerEncoder:
    """Any transformer that sentence-transformers loads.

    Raises:
        ValueError: If it contains no transformer: there would be no shape to make floors of.
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
        self.prompts: Mapping[str, Any] = {
            "prompts": model.prompts,
            "default_prompt_name": model.default_prompt_name,
        }
        self.special_ids = sorted(model.tokenizer.all_special_ids)
        file = model.tokenizer.backend_tokenizer.to_str().encode()
        self._tokenizer = build_tokenizer(file, self.max_length)

    def names(self) -> tuple[str, ...]:
        """Return the only output, dense vectors."""
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
        """Normalised dense vectors of texts."""
        vectors = self.model.encode(
            list(texts),
            batch_size=self.batch_size,
            show_progress_bar=progress,
            normalize_embeddings=True,
            prompt="",  # the texts already contain theirs
        )
        check_finite({"dense_vecs": torch.from_numpy(vectors)}, self.name)
        return Encoded(vectors, None, self.tokenize(texts).truncated)

    def count_parameters(self) -> dict[str, int]:
        """Parameters by part, as :func:`bge_pruning.models.encoder_shape.count_parameters`."""
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


log = logging.getLogger(__name__)
AnyEncoder = TextEncoder | OnnxEncoder | SentenceTransformerEncoder


def check_model_name(name: str) -> None:
    """Refuse a name that cannot be a model (see :func:`load_encoder`), without loading anything."""
    path = Path(name)
    is_path = path.is_absolute() or name.startswith(".") or len(path.parts) != 2
    if path.suffix == ".onnx":
        _check_folder(find_model_folder(path))
    elif path.is_dir():
        _check_folder(path)
    elif is_path and not path.is_file():
        raise FileNotFoundError(
            f"model {name} is not a folder. To fix, give a model's folder, a run's folder or "
            f"checkpoint, or owner/name on the hub."
        )


def fetch_models(names: Sequence[str]) -> None:
    """Refuse names that cannot be models, and download those on the hub, before any is scored."""
    for name in names:
        check_model_name(name)
    for name in names:
        if not Path(name).exists():
            _check_folder(fetch_model_folder(name))


def _is_model(folder: Path) -> bool:
    return (encoder_folder(folder) / "config.json").is_file()


def _check_folder(folder: Path) -> None:
    refuse_adapter(folder)
    if not _is_model(folder):
        try:
            checkpoint.find_checkpoint(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} holds neither a model (config.json) nor a run's checkpoint. To fix, "
                f"give the folder of a model, or of a run that saved a checkpoint."
            ) from error
    elif not (folder / "modules.json").is_file():
        # sentence-transformers would silently fall back to mean pooling.
        raise ValueError(
            f"{folder} has no modules.json, so its pooling is unknown. To fix, extract or export "
            "it again."
        )


def load_encoder(
    name: str,
    device: str = "cpu",
    max_length: int | None = None,
    batch_size: int = 32,
    prompts: Mapping[str, str] | None = None,
    precision: str = "fp32",
) -> AnyEncoder:
    """Load a model; XLM-R and BERT with all their outputs, others through sentence-transformers.

    Encoders with modules that this package does not apply, such as a Dense with an
    activation, are loaded through sentence-transformers too: their dense vectors are correct then,
    and they have no other outputs.

    Args:
        name: Folder, checkpoint file, run folder (its newest checkpoint), ONNX file in a model
            folder, or hub name.
        max_length: Tokens at which texts are cut, at most the model's own limit; ``None`` keeps it.
        prompts: Written before a ``query`` or a ``passage`` instead of what the model's files say.
        precision: Of the layers' products, ``fp32`` or ``bf16``, which is faster where the device
            has instructions for it.

    Raises:
        ValueError: If the model cannot be loaded, or ``max_length`` leaves no room for text.
        OSError: If the hub cannot deliver it.
    """
    check_model_name(name)
    encoder = _load(name, device, max_length, batch_size)
    encoder.prompts = {**encoder.prompts, "given": prompts}
    if precision == "bf16":
        if not isinstance(encoder, TextEncoder):
            raise ValueError(
                f"precision is bf16, but {name} is computed by another library. To fix, use fp32."
            )
        encoder.half = True
    return encoder


def _load(name: str, device: str, max_length: int | None, batch_size: int) -> AnyEncoder:
    path = Path(name)
    if path.suffix == ".onnx":
        return OnnxEncoder(path, device, max_length, batch_size)
    if path.is_file() or (path.is_dir() and not _is_model(path)):
        return TextEncoder(load_checkpoint(path), device, max_length, batch_size)
    folder = fetch_model_folder(name)
    _check_folder(folder)
    check_prompts_are_pooled(folder)
    config = read_json(encoder_folder(folder) / "config.json")
    if config.get("model_type") in ("xlm-roberta", "bert"):
        try:
            return TextEncoder(load_base_model(name), device, max_length, batch_size)
        except ForeignModelError as error:
            log.warning("only dense vectors, by sentence-transformers: %s", error)
    return _load_sentence_transformer(name, device, max_length, batch_size)


def load_checkpoint(path: Path) -> BaseModel:
    """The model that extraction would write from a checkpoint (of a run folder, its newest)."""
    model = checkpoint.load_trained_model(checkpoint.find_checkpoint(path))
    masks, shape = checkpoint.final_gates(model)
    base = checkpoint.as_base_model(model, str(path))
    checkpoint.cut(base.backbone, base.heads, base.backbone.keep_indices(masks))
    return replace(base, shape=shape)


def _load_sentence_transformer(
    name: str, device: str, max_length: int | None, batch_size: int
) -> SentenceTransformerEncoder:
    from sentence_transformers import SentenceTransformer

    try:
        with no_loading_bars():
            model = SentenceTransformer(name, device=device)
    except Exception as error:  # each library raises its own classes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{name} cannot be loaded on {device} ({reason}). To fix, check the name and the "
            f"device, and that its files are complete."
        ) from error
    return SentenceTransformerEncoder(model, name, max_length, batch_size)


def untrained_encoder(encoder: AnyEncoder, seed: int) -> TextEncoder | SentenceTransformerEncoder:
    """Make the floor of random weights: a model of the same shape that was never trained."""
    if isinstance(encoder, SentenceTransformerEncoder):
        floor = encoder.untrained(seed)
    else:
        is_file = isinstance(encoder, OnnxEncoder)
        trained = load_base_model(str(encoder.folder)) if is_file else encoder.base
        base = with_random_weights(trained, seed)
        floor = TextEncoder(base, encoder.device, encoder.max_length, encoder.batch_size)
        floor.half = not is_file and encoder.half
    floor.prompts = encoder.prompts
    return floor


def count_parameters(encoder: AnyEncoder) -> dict[str, int]:
    """Count parameters of ``encoder``, ``embeddings``, ``pooler``, ``heads`` and the ``total``.

    A projection counts as a head.
    """
    if isinstance(encoder, SentenceTransformerEncoder):
        return encoder.count_parameters()
    if isinstance(encoder, OnnxEncoder):
        counts = count_shape(read_shape(encoder.folder))
        heads, projection = counts.heads, read_projection(encoder.folder)
    else:
        counts, projection = encoder.backbone.count_parameters(), encoder.projection
        heads = sum(parameter.numel() for parameter in encoder.heads.parameters())
    if projection is not None:
        heads += projection.numel()
    return replace(counts, heads=heads).as_dict()
