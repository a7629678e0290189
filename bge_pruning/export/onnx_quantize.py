"""Dynamic int8 quantisation of an exported graph, for CPUs.

Weights become int8 once; the inputs of every product are quantised as they come, with one range for
the whole batch. So a text's vector depends a little on the texts beside it, padding included. On a
GPU the float32 file, or torch in fp16, is faster.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bge_pruning.evaluation.onnx_encoder import OnnxEncoder, onnx_files
from bge_pruning.export.onnx_export import DATA, FOLDER, MODEL, SINGLE_FILE_BYTES
from bge_pruning.export.onnx_graph import PROJECTION
from bge_pruning.export.validation import VALIDATION_SENTENCES
from bge_pruning.model_io.model_files import find_prompt
from bge_pruning.utils.files import refuse_existing
from bge_pruning.utils.guard import import_optional
from bge_pruning.utils.model_analysis import measure_speed
from bge_pruning.utils.records import Int8Record

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

log = logging.getLogger(__name__)
QUANTISED = "model_quantized.onnx"
WORDS = "embeddings.word_embeddings.weight"
# Together 0.2 % of BGE-M3, or 0.4 % with a projection: there is nothing to gain, and scores depend
# on them directly.
HEADS = ("sparse_linear", "colbert_linear", PROJECTION)
# int8 without its smallest number, so that the range is symmetric.
LARGEST = 127
# A scale for each output of a product. 7 bits for weights: CPUs without VNNI add pairs of products
# in 16 bits, which 8-bit weights silently overflow, and the file may go to any CPU. A scale for
# each row of the embeddings, where ONNX Runtime's quantiser has one for the whole table.
#
# all-MiniLM-L6-v2 (6 layers, H=384) on the 2,552 sentences of stsb-en-test.csv, 2 threads of an AMD
# EPYC with VNNI:
#
#                             MB   cosine to float32: mean, lowest   Spearman (float32 0.8203)
# exported                  24.1                     0.9913, 0.952                      0.8205
# 8 bits                    24.1                     0.9924, 0.968                      0.8170
# one scale a matrix        24.0                     0.8662, 0.560                      0.8040
# embeddings with one scale 23.4                     0.9910, 0.960                      0.8195
# embeddings in float32     59.2                     0.9912, 0.958                      0.8185
#
# All take half the time of float32 (90.9 MB): 2.0 to 2.1 times the texts per second in batches,
# 0.49 to 0.53 times the time of one text. Rows of embeddings cost nothing and are most of what is
# saved. In evaluate_model.py the exported file keeps 99.8 % of dense, 100.0 % of sparse and 99.3 %
# of multi-vector nDCG@10 on data/mteb/scifact-sample.
SETTINGS = {"per_channel": True, "reduce_range": True, "embeddings": "rows"}
# First sentences, second sentences, gold scores.
Pairs = tuple[Sequence[str], Sequence[str], Sequence[float]]


def measure_int8(
    int8: OnnxEncoder, float32: OnnxEncoder, pairs: Pairs | None = None, rounds: int = 7
) -> dict[str, Any]:
    """Compare two files of one model on texts with gold scores.

    Returns:
        ``texts`` compared; ``cosine`` of the two files' vectors by output, ``mean`` and ``min`` (of
        a text for ``dense_vecs`` and ``token_weights``, of a token for ``colbert_vecs``);
        ``spearman`` of the dense similarities with the gold scores (``float32``, ``int8``,
        ``change``, ``pairs``), or ``None``; ``speed``; ``versions``.
    """
    if pairs is not None:  # as they are evaluated
        prompt = find_prompt(float32.prompts, "text", ("STS",))
        pairs = (*([prompt + text for text in part] for part in pairs[:2]), pairs[2])
    first, second, _ = pairs or (VALIDATION_SENTENCES, (), ())
    texts = list(dict.fromkeys((*first, *second)))
    return {
        "texts": len(texts),
        "cosine": _cosines(int8, float32, texts),
        "spearman": None if pairs is None else _spearman(int8, float32, pairs),
        "speed": measure_speed(int8, float32, texts, rounds=rounds),
        "versions": {name: version(name) for name in ("onnx", "onnxruntime")},
    }


def _cosines(
    int8: OnnxEncoder, float32: OnnxEncoder, texts: Sequence[str]
) -> dict[str, dict[str, float]]:
    tokens, names = float32.tokenize(texts), float32.names()
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    both = zip(int8.batches(tokens, names), float32.batches(tokens, names), strict=True)
    for (_, _, mask, ours), (_, _, _, theirs) in both:
        for name in names:
            cosine = torch.cosine_similarity(ours[name], theirs[name], dim=-1)
            if name == "colbert_vecs":
                cosine = cosine[mask[:, 1:].bool()]
            elif name == "token_weights":
                # A text without any weight has no direction.
                cosine = cosine[(theirs[name] > 0).any(dim=1)]
            found[name].append(cosine)
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return {
        name: {"mean": float(cosine.mean()), "min": float(cosine.min())}
        for name, cosine in joined.items()
        if len(cosine)
    }


def _spearman(int8: OnnxEncoder, float32: OnnxEncoder, pairs: Pairs) -> dict[str, float]:
    from scipy.stats import spearmanr

    def score(encoder: OnnxEncoder) -> float:
        first, second = (encoder.encode(texts).dense_vecs for texts in pairs[:2])
        return float(spearmanr(np.einsum("nh,nh->n", first, second), pairs[2]).statistic)

    ours, theirs = score(int8), score(float32)
    return {"float32": theirs, "int8": ours, "change": ours - theirs, "pairs": len(pairs[2])}


def export_onnx_int8(
    folder: Path, pairs: Pairs | None = None, overwrite: bool = False, rounds: int = 7
) -> Int8Record:
    """Write ``onnx/model_quantized.onnx`` beside ``onnx/model.onnx``, and measure what it loses.

    The files are compared on pairs of sentences with gold scores, or, without pairs, on the
    sentences of extraction's validation. Their speed is measured in turns, ``rounds`` times.

    Raises:
        ImportError: If ``onnx`` or ``onnxruntime`` is not installed.
        FileExistsError: If the file exists and may not be replaced.
        FileNotFoundError: If there is no export.
        ValueError: If the weights are too many for one file, or an output is not finite.
    """
    output = folder / FOLDER / QUANTISED
    refuse_existing([output], overwrite=overwrite)
    with quantised(folder) as path:
        loss = measure_int8(OnnxEncoder(path), OnnxEncoder(folder / FOLDER / MODEL), pairs, rounds)
        os.replace(path, output)
    record = Int8Record(
        file=f"{FOLDER}/{QUANTISED}",
        bytes=output.stat().st_size,
        bytes_float32=sum(f.stat().st_size for f in onnx_files(folder / FOLDER / MODEL)),
        settings=SETTINGS,
        **loss,
    )
    log.info("%s: %s", record.file, describe_loss(record))
    return record


def describe_loss(record: Int8Record) -> str:
    """Describe in one line what int8 loses and gains."""
    dense, speed = record.cosine.dense_vecs, record.speed
    text = (
        f"cosine to float32 {dense.mean:.4f} (lowest {dense.min:.4f} of {record.texts} texts), "
        f"{speed.throughput_texts_per_s.ratio:.2f} times the texts per second, "
        f"{speed.latency_ms.ratio:.2f} times the time of one text"
    )
    if record.spearman is not None:
        found = record.spearman
        text += f", Spearman {found.int8:.4f} (float32 {found.float32:.4f})"
    return text


@contextmanager
def quantised(folder: Path) -> Iterator[Path]:
    """Quantise a folder's graph in a temporary folder beside it; the file may be moved away."""
    source = folder / FOLDER / MODEL
    if not source.is_file():
        raise FileNotFoundError(
            f"{source}: no such file. To fix, export the model first: int8 is made from float32."
        )
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-int8.partial-", dir=folder) as name:
        staging = Path(name)
        _prepare(source, staging)
        model = _quantise(staging)
        size = sum(len(weight.raw_data) for weight in model.graph.initializer)
        if size > SINGLE_FILE_BYTES:
            raise ValueError(
                f"{source}: {size / 1e9:.1f} GB of int8 weights are more than one ONNX file can "
                f"hold ({SINGLE_FILE_BYTES / 1e9:.1f} GB). To fix, use the float32 file."
            )
        path = staging / QUANTISED
        path.write_bytes(model.SerializeToString())
        import_optional("onnx.checker", "onnx").check_model(str(path), full_check=True)
        yield path


def _prepare(source: Path, staging: Path) -> None:
    """Write the graph, marked as ready to be quantised, and its weights if they are apart.

    ONNX Runtime advises to infer shapes and to simplify first, and warns if the mark is missing;
    in our graph there is nothing to simplify.
    """
    onnx = import_optional("onnx", "onnx")
    model = onnx.load(source, load_external_data=False)
    import_optional("onnxruntime.quantization.quant_utils", "onnx").add_pre_process_metadata(model)
    (staging / MODEL).write_bytes(model.SerializeToString())
    data = source.with_name(DATA)
    if data.is_file():  # a copy: onnx refuses links of any kind
        shutil.copyfile(data, staging / DATA)


def _quantise(staging: Path) -> ModelProto:
    onnx = import_optional("onnx", "onnx")
    quantization = import_optional("onnxruntime.quantization", "onnx")
    large = staging / "large.onnx"
    quantization.quantize_dynamic(
        staging / MODEL,
        large,
        op_types_to_quantize=["MatMul"],
        per_channel=SETTINGS["per_channel"],
        reduce_range=SETTINGS["reduce_range"],
        nodes_to_exclude=list(HEADS),
        # Beside the file: with float32 embeddings it may be too large for one.
        use_external_data_format=True,
    )
    model = onnx.load(large)
    quantise_rows(model.graph, WORDS)
    return model


def quantise_rows(graph: GraphProto, name: str) -> None:
    """Keep an embedding table ``(V, H)``, by its name, as int8 with a scale for each row, in place.

    ``table[i] = scale[i] * int8[i]``, with ``scale[i] = max |table[i]| / 127``; only the rows that
    a Gather looks up are multiplied.
    """
    onnx = import_optional("onnx", "onnx")
    (table,) = [weight for weight in graph.initializer if weight.name == name]
    values = onnx.numpy_helper.to_array(table)
    scales = np.abs(values).max(axis=1, keepdims=True) / LARGEST
    scales[scales == 0] = 1.0  # the row of the padding token may be 0
    rows = np.rint(values / scales).astype(np.int8)
    graph.initializer.remove(table)
    for suffix, array in (("int8", rows), ("scale", scales)):
        graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}_{suffix}"))
    nodes = [part for node in graph.node for part in _look_up(node, name)]
    del graph.node[:]
    graph.node.extend(nodes)


def _look_up(node: Any, name: str) -> list[Any]:
    """The nodes that take the place of one."""
    if node.op_type != "Gather" or node.input[0] != name:
        return [node]
    helper = import_optional("onnx.helper", "onnx")
    ids, output = node.input[1], node.output[0]
    rows, scales, floats = (f"{output}_{part}" for part in ("int8", "scale", "float"))
    return [
        helper.make_node("Gather", [f"{name}_int8", ids], [rows], rows),
        helper.make_node("Cast", [rows], [floats], floats, to=helper.TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}_scale", ids], [scales], scales),
        helper.make_node("Mul", [floats, scales], [output], output),
    ]
