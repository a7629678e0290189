"""Encodes texts with a model's ONNX file, like any other model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bge_pruning.evaluation.text_encoder import BatchEncoder, TextSide
from bge_pruning.model_io import model_files
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.models.embedding_heads import OUTPUT_NAMES
from bge_pruning.utils.guard import import_optional

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


INPUTS = ("input_ids", "attention_mask")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(path: Path, device: str = "cpu") -> InferenceSession:
    """Open a session with as many threads as torch has, so that their speeds can be compared.

    Raises:
        ValueError: If it has no support for the device, or the file is damaged.
    """
    runtime = import_optional("onnxruntime", "onnx")
    provider = find_provider(device, str(path))
    kind, _, index = device.partition(":")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait by spinning would slow the other model of a comparison, or torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only
    settings = {"device_id": int(index or 0)} if kind == "cuda" else {}
    try:
        return runtime.InferenceSession(str(path), options, providers=[(provider, settings)])
    except Exception as error:  # the library has one class for each of its error codes
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path}: cannot be loaded ({reason}). To fix, export the model again."
        ) from error


def find_provider(device: str, name: str) -> str:
    """Find the execution provider of a device, if ONNX Runtime is built for it."""
    provider = PROVIDERS.get(device.partition(":")[0])
    if provider not in import_optional("onnxruntime", "onnx").get_available_providers():
        raise ValueError(
            f"{name}: the installed ONNX Runtime cannot run on {device}. To fix, pass --device "
            f"cpu, or pip install onnxruntime-gpu in place of onnxruntime."
        )
    return provider


def run_session(
    session: InferenceSession, ids: Tensor, mask: Tensor, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Compute outputs by name; ids are int64, ``(B, T)``, and the mask, 0 for padding, likewise."""
    inputs = {name: t.cpu().numpy() for name, t in zip(INPUTS, (ids, mask), strict=True)}
    return dict(zip(names, session.run(list(names), inputs), strict=True))


class OnnxEncoder(BatchEncoder):
    """An ONNX file of :func:`bge_pruning.export.onnx_export.export_onnx`, or its int8 form.

    It is in a model folder or in its ``onnx`` folder.

    Raises:
        FileNotFoundError: If there is no such file, or it is not in a model folder.
        ValueError: If the file is damaged, has other outputs, or cannot run on the device.
    """

    def __init__(
        self, path: Path, device: str = "cpu", max_length: int | None = None, batch_size: int = 64
    ) -> None:
        self.path = path
        self.folder = find_model_folder(path)
        self.session = open_session(path, device)
        self._names = _find_outputs(path, self.session)
        config = model_files.read_hf_config(self.folder)
        side = TextSide(
            str(path),
            model_files.read_tokenizer_files(self.folder, config["vocab_size"]),
            _find_dense_size(path, self.session),
            config["vocab_size"],
            config["pad_token_id"],
            model_files.read_max_seq_length(self.folder, config),
            model_files.read_prompts(self.folder),
        )
        super().__init__(side, device, max_length, batch_size)

    def names(self) -> tuple[str, ...]:
        """The outputs that the file has."""
        return self._names

    def word_table(self) -> np.ndarray:
        """Word embeddings of the folder's weights, shape ``(V, H)``."""
        base = load_base_model(str(self.folder))
        return base.backbone.embeddings.word_embeddings.weight.detach().numpy().copy()

    def compute(self, ids: Tensor, mask: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of one batch by name, see :class:`BatchEncoder`."""
        outputs = run_session(self.session, ids, mask, names)
        return {name: torch.from_numpy(value).to(self.device) for name, value in outputs.items()}


def find_model_folder(path: Path) -> Path:
    """Find the model folder of an ONNX file: the one it is in, or the one above."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. To fix, export the model with extract_pruned_model.py --onnx."
        )
    folders = (path.resolve().parent, path.resolve().parent.parent)
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{path}: is not in a model's folder (no config.json beside it or one folder above). To "
        f"fix, keep it where it was exported: in the folder onnx of its model."
    )


def onnx_files(path: Path) -> list[Path]:
    """List an ONNX file and, if there is one, the separate file of its weights."""
    return [file for file in (path, path.with_name(f"{path.name}_data")) if file.is_file()]


def _find_outputs(path: Path, session: InferenceSession) -> tuple[str, ...]:
    there = [output.name for output in session.get_outputs()]
    names = tuple(name for name in OUTPUT_NAMES.values() if name in there)
    if "dense_vecs" not in names:
        raise ValueError(
            f"{path}: has the outputs {', '.join(there)}, expected dense_vecs. To fix, export it "
            f"with this package: other exporters leave out pooling and heads."
        )
    return names


def _find_dense_size(path: Path, session: InferenceSession) -> int:
    """Read the size from the file, which may be older or newer than the folder's projection."""
    (shape,) = [found.shape for found in session.get_outputs() if found.name == "dense_vecs"]
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise ValueError(
            f"{path}: dense_vecs has the shape {shape}, expected a fixed size of vectors. To fix, "
            f"export it with this package."
        )
    return shape[1]
