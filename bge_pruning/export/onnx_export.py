"""Export a model folder to ONNX: one graph with all outputs, compared with torch before it is kept.

``onnx/model.onnx`` is where sentence-transformers, Optimum and text-embeddings-inference look.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bge_pruning.datasets.embedding_dataset import build_tokenizer, pad_texts
from bge_pruning.evaluation.onnx_encoder import open_session, run_session
from bge_pruning.export.onnx_graph import (
    HIDDEN,
    IR_VERSION,
    OPSET,
    Store,
    build_graph,
    widen_constant,
)
from bge_pruning.export.validation import VALIDATION_SENTENCES, in_float64
from bge_pruning.model_io.model_files import read_special_ids
from bge_pruning.model_io.pretrained import BaseModel, load_base_model
from bge_pruning.model_io.projection import project
from bge_pruning.utils.files import atomic_folder, check_free
from bge_pruning.utils.guard import import_optional
from bge_pruning.utils.records import Float64Distances, OnnxRecord

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto
    from onnx.reference import ReferenceEvaluator

log = logging.getLogger(__name__)

FOLDER, MODEL, DATA = "onnx", "model.onnx", "model.onnx_data"
# Relative to the largest value of an output where that is above 1, as float32 rounds.
TOLERANCE = 1e-5
# Where float32 does not suffice to tell, ONNX Runtime may be this many times as far from float64 as
# torch's own float32 is. Both are draws from one distribution: of 84 random models that magnify
# rounding by 1 to 10,000, a right graph came to 17 times at most, GELU by tanh to 40 at least. A
# wrong graph is told by float64 before.
FACTOR = 32
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
        OnnxExportError: If the graph computes something else, see :func:`check_graph`: nothing is
            kept.
    """
    for library in ("onnx", "onnxruntime"):
        import_optional(library, "onnx")
    output = folder / FOLDER
    check_free(output, MODEL, overwrite)
    base = load_base_model(str(folder)) if base is None else base
    with atomic_folder(output, MODEL, overwrite) as staging:
        model = write_graph(base, staging)
        comparison = check_graph(base, staging / MODEL)
    files = [path for name in (MODEL, DATA) if (path := output / name).is_file()]
    info = OnnxRecord(
        file=f"{FOLDER}/{MODEL}",
        data=f"{FOLDER}/{DATA}" if len(files) > 1 else None,
        bytes=sum(path.stat().st_size for path in files),
        opset=OPSET,
        outputs=[found.name for found in model.graph.output],
        tolerance=TOLERANCE,
        versions={name: version(name) for name in ("onnx", "onnxruntime", "torch")},
        **comparison,
    )
    log.info("%s beside torch: %s", info.file, describe_comparison(info))
    return info


def describe_comparison(record: OnnxRecord) -> str:
    """Say how near the graph is to the model, and by which reference."""
    if record.float64 is None:
        return f"largest difference {max(record.largest_difference.values()):.1e}, float32"
    graph, runtime, torch_ = (
        max(found.values())
        for found in (record.float64.graph, record.float64.onnxruntime, record.float64.torch)
    )
    return (
        f"largest difference {graph:.1e}, float64; from that float32, whose rounding this model "
        f"magnifies, is {runtime:.1e} in ONNX Runtime and {torch_:.1e} in torch"
    )


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
        build_graph(
            base.backbone,
            base.heads,
            store,
            sorted(read_special_ids(base.tokenizer_files)),
            base.projection,
        ),
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


def check_graph(base: BaseModel, path: Path) -> dict[str, dict[str, Any]]:
    """Refuse a graph that computes something else than the model it was made from.

    Real sentences run in float32, in ONNX Runtime and in torch. A model can magnify what float32
    rounds, so that two right computations differ by more than ``TOLERANCE``. Then torch's float64
    is the reference: the same graph, run in float64 too, must agree with it to ``TOLERANCE``, and
    ONNX Runtime may not be more than ``FACTOR`` times as far from it as torch's float32 is.

    Returns:
        ``largest_difference`` in float32 by output, padding left out, relative to the largest value
        of the output where that is above 1; ``float64``, if it was needed: the distances from it of
        ``graph`` (in float64), ``onnxruntime`` and ``torch``.

    Raises:
        OnnxExportError: If an output differs by more.
    """
    base.backbone.cpu().float().eval()
    base.heads.cpu().float().eval()
    differences = compare_with_torch(base, path)
    if all(d <= TOLERANCE for d in differences.values()):
        return {"largest_difference": differences}
    found = None
    if all(np.isfinite(list(differences.values()))):
        found = compare_in_float64(base, path)
    check_differences(found["graph"] if found else differences)
    check_runtime(found["onnxruntime"], found["torch"])
    return {"largest_difference": differences, "float64": Float64Distances(**found)}


@torch.no_grad()
def compare_with_torch(base: BaseModel, path: Path) -> dict[str, float]:
    """Largest difference of ONNX Runtime from torch, both in float32, by output."""
    session, names = open_session(path), (HIDDEN, *base.heads.names())
    found = dict.fromkeys(names, 0.0)
    for ids, mask in _batches(base):
        _note(found, run_session(session, ids, mask, names), _run_torch(base, ids, mask), mask)
    return found


@torch.no_grad()
def compare_in_float64(base: BaseModel, path: Path) -> dict[str, dict[str, float]]:
    """Largest differences from torch's float64, by output, see :func:`check_graph`."""
    session, graph = open_session(path), read_in_float64(path)
    names = (HIDDEN, *base.heads.names())
    found = {name: dict.fromkeys(names, 0.0) for name in ("graph", "onnxruntime", "torch")}
    for ids, mask in _batches(base):
        with in_float64(base.backbone, base.heads):
            exact = _run_torch(base, ids, mask)
        _note(found["graph"], run_session(graph, ids, mask, names), exact, mask)
        _note(found["onnxruntime"], run_session(session, ids, mask, names), exact, mask)
        _note(found["torch"], _run_torch(base, ids, mask), exact, mask)
    return found


def _run_torch(base: BaseModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """All that the graph computes, of a batch ``(B, T)``."""
    hidden = base.backbone(ids, mask)
    outputs = {HIDDEN: hidden, **base.heads.outputs(hidden, mask)}
    if base.projection is not None:
        outputs["dense_vecs"] = project(outputs["dense_vecs"], base.projection)
    if "token_weights" in outputs:
        special = torch.tensor(sorted(read_special_ids(base.tokenizer_files)))
        outputs["token_weights"] = outputs["token_weights"] * ~torch.isin(ids, special)
    return outputs


def _note(
    differences: dict[str, float],
    found: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    mask: Tensor,
) -> None:
    """Raise the largest differences, in place, to those of a batch."""
    for name, value in expected.items():
        got = torch.as_tensor(found[name])
        if name == HIDDEN:
            value, got = value[mask.bool()], got[mask.bool()]
        scale = max(1.0, float(value.abs().max()))
        # Not Python's max, which would drop a NaN.
        both = torch.tensor([differences[name], (got - value).abs().max() / scale])
        differences[name] = float(both.max())


def read_in_float64(path: Path) -> ReferenceEvaluator:
    """The delivered graph with every number in float64, to run in numpy."""
    from scipy.special import erf

    onnx = import_optional("onnx", "onnx")
    reference = import_optional("onnx.reference", "onnx")
    run = import_optional("onnx.reference.op_run", "onnx").OpRun
    single, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    model = onnx.load(path)
    for weight in model.graph.initializer:
        if weight.data_type == single:
            array = widen_constant(weight.name, onnx.numpy_helper.to_array(weight))
            weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Cast" else ():
            attribute.i = double if attribute.i == single else attribute.i
    for output in model.graph.output:
        output.type.tensor_type.elem_type = double
    # The library's own is in float32.
    kind = type("Erf", (run,), {"op_domain": "", "_run": lambda _, x: (erf(x),)})
    return reference.ReferenceEvaluator(model, new_ops=[kind])


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


def check_differences(differences: Mapping[str, float]) -> None:
    """Refuse a graph that computes something else."""
    wrong = [f"{name} {d:.2e}" for name, d in differences.items() if not d <= TOLERANCE]
    if wrong:
        raise OnnxExportError(
            f"the ONNX graph differs from the model by more than {TOLERANCE:.0e}: "
            f"{', '.join(wrong)}. To fix, look for NaN in the model's weights; if there are none, "
            f"report it with the versions of onnxruntime and torch: it is a defect of the export."
        )


def check_runtime(found: Mapping[str, float], torch_found: Mapping[str, float]) -> None:
    """Refuse float32 of ONNX Runtime that is much farther from float64 than torch's."""
    wrong = [
        f"{name} {d:.2e} (torch {torch_found[name]:.2e})"
        for name, d in found.items()
        if not d <= max(TOLERANCE, FACTOR * torch_found[name])
    ]
    if wrong:
        raise OnnxExportError(
            f"in float64 the ONNX graph is right, but ONNX Runtime's float32 is more than {FACTOR} "
            f"times as far from it as torch's: {', '.join(wrong)}. To fix, try another version of "
            f"onnxruntime, and report it with both versions."
        )
