"""Export a model folder to ONNX: one graph with all outputs, compared with torch before it is kept.

``onnx/model.onnx`` is where sentence-transformers, Optimum and text-embeddings-inference look.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bge_pruning.datasets.embedding_dataset import build_tokenizer, pad_texts
from bge_pruning.evaluation.onnx_encoder import open_session, run_session
from bge_pruning.export.onnx_graph import HIDDEN, IR_VERSION, OPSET, Store, build_graph
from bge_pruning.export.validation import VALIDATION_SENTENCES
from bge_pruning.model_io.pretrained import BaseModel, load_base_model
from bge_pruning.model_io.projection import project
from bge_pruning.utils.files import atomic_folder, check_free
from bge_pruning.utils.guard import import_optional
from bge_pruning.utils.records import OnnxRecord

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

log = logging.getLogger(__name__)

FOLDER, MODEL, DATA = "onnx", "model.onnx", "model.onnx_data"
# Relative to the largest value of an output where that is above 1, as float32 rounds.
TOLERANCE = 1e-5
# A protobuf file holds at most 2 GiB; larger models keep their weights in DATA, as Optimum expects.
SINGLE_FILE_BYTES = 1_900_000_000
# Weights in DATA start at a page, so that a runtime can map them.
PAGE = 4096
# Attention of one text takes A * T * T numbers here: 8,192 tokens of BGE-M3 would be 4 GiB a layer.
LONGEST = 2048


class OnnxExportError(RuntimeError):
    """The exported graph does not compute what the model computes."""


def export_onnx(folder: Path, base: BaseModel | None = None, overwrite: bool = False) -> OnnxRecord:
    """Write ``onnx/model.onnx`` into a model folder, and validate it.

    See :func:`bge_pruning.export.onnx_graph.build_graph` for inputs and outputs. The weights are
    float32, whatever the folder's precision; ``base``, the model if it is loaded already, is moved
    to the CPU and set to float32. With ``overwrite`` all of ``onnx`` is replaced.

    Raises:
        ImportError: If ``onnx`` or ``onnxruntime`` is not installed.
        FileExistsError: If ``onnx`` exists and may not be replaced.
        FileNotFoundError: If a file of the model is missing.
        ValueError: If files of the model are damaged or disagree.
        OnnxExportError: If an output differs by more than ``TOLERANCE``: nothing is kept.
    """
    for library in ("onnx", "onnxruntime"):
        import_optional(library, "onnx")
    output = folder / FOLDER
    check_free(output, MODEL, overwrite)
    base = load_base_model(str(folder)) if base is None else base
    with atomic_folder(output, MODEL, overwrite) as staging:
        model = write_graph(base, staging)
        differences = compare_with_torch(base, staging / MODEL)
        check_differences(differences)
    files = [path for name in (MODEL, DATA) if (path := output / name).is_file()]
    info = OnnxRecord(
        file=f"{FOLDER}/{MODEL}",
        data=f"{FOLDER}/{DATA}" if len(files) > 1 else None,
        bytes=sum(path.stat().st_size for path in files),
        opset=OPSET,
        outputs=[found.name for found in model.graph.output],
        largest_difference=differences,
        tolerance=TOLERANCE,
        versions={name: version(name) for name in ("onnx", "onnxruntime", "torch")},
    )
    log.info("%s: largest difference from torch %.1e", info.file, max(differences.values()))
    return info


def write_graph(base: BaseModel, folder: Path) -> ModelProto:
    """Write the graph, and beside it the weights if they are too large for one file."""
    onnx = import_optional("onnx", "onnx")
    weights: list[Tensor] = [*base.backbone.parameters(), *base.heads.parameters()]
    if base.projection is not None:
        weights.append(base.projection)
    if 4 * sum(weight.numel() for weight in weights) <= SINGLE_FILE_BYTES:
        model = _model(base, lambda name, array: onnx.numpy_helper.from_array(array, name))
    else:
        with (folder / DATA).open("wb") as file:
            model = _model(base, lambda name, array: _store_outside(file, name, array))
    path = folder / MODEL
    path.write_bytes(model.SerializeToString())
    # By path: in memory, weights in another file could not be checked.
    onnx.checker.check_model(str(path), full_check=True)
    return model


def _model(base: BaseModel, store: Store) -> ModelProto:
    helper = import_optional("onnx.helper", "onnx")
    return helper.make_model(
        build_graph(base.backbone, base.heads, store, base.projection),
        producer_name="bge_pruning",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )


def _store_outside(file: Any, name: str, array: np.ndarray) -> TensorProto:
    """Append an array to a file; the tensor says where it is."""
    onnx = import_optional("onnx", "onnx")
    file.write(b"\0" * (-file.tell() % PAGE))
    offset = file.tell()
    array.tofile(file)
    tensor = onnx.TensorProto(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", DATA), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@torch.inference_mode()
def compare_with_torch(base: BaseModel, path: Path) -> dict[str, float]:
    """Run a graph beside the model it was made from, on real sentences.

    Returns the largest difference by output, padding left out, relative to the largest value of
    the output where that is above 1.
    """
    backbone, heads = base.backbone.cpu().float().eval(), base.heads.cpu().float().eval()
    session = open_session(path)
    names = (HIDDEN, *heads.names())
    differences = dict.fromkeys(names, 0.0)
    for ids, mask in _batches(base):
        hidden = backbone(ids, mask)
        expected = {HIDDEN: hidden, **heads.outputs(hidden, mask)}
        if base.projection is not None:
            expected["dense_vecs"] = project(expected["dense_vecs"], base.projection)
        found = run_session(session, ids, mask, names)
        for name, value in expected.items():
            got = torch.from_numpy(found[name])
            if name == HIDDEN:
                value, got = value[mask.bool()], got[mask.bool()]
            scale = max(1.0, float(value.abs().max()))
            # Not Python's max, which would drop a NaN.
            both = torch.tensor([differences[name], (got - value).abs().max() / scale])
            differences[name] = float(both.max())
    return differences


def _batches(base: BaseModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Real sentences, all of them; a very long text with a short one; one text alone."""
    limit = min(base.max_seq_length, LONGEST)
    tokenizer = build_tokenizer(base.tokenizer_files["tokenizer.json"], limit)

    def pad(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [np.array(tokenizer.encode(text).ids) for text in texts]
        return pad_texts(rows, base.hf_config["pad_token_id"])

    everything = " ".join(VALIDATION_SENTENCES)
    repeats = 1 + limit // len(everything.split())  # a word is one token or more
    longest = " ".join([everything] * repeats)
    yield pad(list(VALIDATION_SENTENCES))
    yield pad([longest, VALIDATION_SENTENCES[1]])
    yield pad([VALIDATION_SENTENCES[0]])


def check_differences(differences: dict[str, float]) -> None:
    """Refuse a graph that computes something else."""
    wrong = [f"{name} {d:.2e}" for name, d in differences.items() if not d <= TOLERANCE]
    if wrong:
        raise OnnxExportError(
            f"the ONNX graph differs from the model by more than {TOLERANCE:.0e}: "
            f"{', '.join(wrong)}. To fix, look for NaN in the model's weights; if there are none, "
            f"report it with the versions of onnxruntime and torch: it is a defect of the export."
        )
