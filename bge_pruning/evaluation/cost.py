"""What a model costs beside its baseline: parameters, size on disk, speed and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bge_pruning.evaluation.encoders import AnyEncoder, OnnxEncoder, TextEncoder
from bge_pruning.evaluation.onnx_encoder import onnx_files
from bge_pruning.evaluation.sentence_transformer import SentenceTransformerEncoder
from bge_pruning.model_io.projection import FOLDER as PROJECTION
from bge_pruning.utils.memory import measure_peak_bytes
from bge_pruning.utils.model_analysis import measure_speed

# Files that hold weights, as far as this project and sentence-transformers read them.
WEIGHT_FILES = (
    *("model*.safetensors", "pytorch_model*.bin", "*_linear.pt"),
    f"{PROJECTION}/model.safetensors",
)


def measure_cost(model: AnyEncoder, baseline: AnyEncoder, texts: Sequence[str]) -> dict[str, Any]:
    """Speed and memory of two models.

    Args:
        model: The model to judge.
        baseline: The unpruned model, on the same device.
        texts: Texts to embed; a sample is used.

    Returns:
        As :func:`measure_speed`, with ``memory_bytes``: the weights, and what other tensors take
        while a batch is embedded (``None`` for ONNX Runtime, which keeps them to itself).
    """
    both = {"model": model, "baseline": baseline}
    batch = list(texts[: model.batch_size])
    memory: dict[str, Any] = {
        "texts": len(batch),
        "tokens": int(model.tokenize(batch).lengths.max()),
    }
    for name, encoder in both.items():
        memory[name] = {
            "weights": weight_bytes(encoder),
            "activations": None
            if isinstance(encoder, OnnxEncoder)
            else measure_peak_bytes(lambda e=encoder: e.encode(batch)),
        }
    return {**measure_speed(model, baseline, texts), "memory_bytes": memory}


def weight_bytes(encoder: AnyEncoder) -> int:
    """Bytes of an encoder's weights; of the files for ONNX Runtime, which keeps them to itself."""
    if isinstance(encoder, OnnxEncoder):
        return sum(file.stat().st_size for file in onnx_files(encoder.path))
    return sum(weight.numel() * weight.element_size() for weight in _weights(encoder))


def _weights(encoder: TextEncoder | SentenceTransformerEncoder) -> list[Tensor]:
    if isinstance(encoder, SentenceTransformerEncoder):
        return list(encoder.model.parameters())
    projection = [] if encoder.projection is None else [encoder.projection]
    return [*encoder.backbone.parameters(), *encoder.heads.parameters(), *projection]


def size_on_disk(name: str | None) -> int | None:
    """Bytes of a folder's weight files or of an ONNX file; ``None`` for anything else.

    Args:
        name: Folder, ONNX file, checkpoint or hub name.
    """
    folder = Path(name or "")
    if folder.suffix == ".onnx":
        return sum(file.stat().st_size for file in onnx_files(folder))
    if name is None or not (folder / "config.json").is_file():
        return None
    files = {file for pattern in WEIGHT_FILES for file in folder.glob(pattern)}
    return sum(file.stat().st_size for file in files)
