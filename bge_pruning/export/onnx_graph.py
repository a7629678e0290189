"""The encoder and its heads as an ONNX graph, written node by node.

Why not ``torch.onnx.export``: its TorchScript exporter is deprecated since torch 2.7 (it warns, and
torch is about to drop it), its successor needs ``onnxscript``, and what either writes changes from
version to version of torch. XLM-R needs 20 kinds of nodes. Written by hand the graph is the same
with any torch, its weights keep Hugging Face's names, it goes to disk without a second copy in
memory, and every export is compared with torch before it is delivered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bge_pruning.models.bge_m3_backbone import Layer, XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.utils.guard import import_optional

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto

# LayerNormalization was added in 17; later sets add nothing that is needed here.
OPSET = 17
# The version of this set; onnx would write its newest, which older runtimes refuse.
IR_VERSION = 8
HIDDEN = "last_hidden_state"
# Second name of projected dense vectors: text-embeddings-inference takes the output of this name if
# there is one, and otherwise pools by itself and leaves out any Dense module.
SENTENCE = "sentence_embedding"
PROJECTION = "projection"
# Names that Optimum knows; it evaluates the last one to size the outputs on a GPU.
BATCH, LENGTH, AFTER_CLS = "batch_size", "sequence_length", "sequence_length - 1"

# Writes an array and returns the tensor that names it.
Store = Callable[[str, np.ndarray], "TensorProto"]


def widen_constant(name: str, array: np.ndarray) -> np.ndarray:
    """A weight in float64; a constant is not what float32 rounded it to, but what its name says."""
    if name.startswith("constant_"):
        value = np.array(float(name.rpartition("_")[2]))
        return value if value.astype(array.dtype) == array else array.astype(np.float64)
    return array.astype(np.float64)


class GraphBuilder:
    """Nodes and weights, in the order in which they are added."""

    def __init__(self, store: Store) -> None:
        self.helper = import_optional("onnx.helper", "onnx")
        self.numpy_helper = import_optional("onnx.numpy_helper", "onnx")
        self.store = store
        self.nodes: list[Any] = []
        self.weights: dict[str, TensorProto] = {}

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name, which is the node's name too."""
        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        """Add a weight in float32; returns its name."""
        array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
        self.weights[name] = self.store(name, array)
        return name

    def constant(self, value: float | list[int], dtype: type[np.generic] = np.float32) -> str:
        """Add a small constant, once for each value; returns its name.

        It stays in the graph itself: runtimes need shapes and axes before they read weights.
        """
        name = f"constant_{np.dtype(dtype).name}_{value}"
        self.weights.setdefault(name, self.numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def linear(self, x: str, name: str, layer: nn.Linear) -> str:
        """``x W^T + b``; the weight is kept as ``(in, out)``, which a product needs no copy of."""
        weight = self.weight(f"{name}.weight", layer.weight.T)
        product = self.node("MatMul", x, weight, output=name)
        return self.node("Add", product, self.weight(f"{name}.bias", layer.bias))

    def layer_norm(self, x: str, name: str, norm: nn.LayerNorm, output: str | None = None) -> str:
        """LayerNorm over the last axis."""
        weight = self.weight(f"{name}.weight", norm.weight)
        bias = self.weight(f"{name}.bias", norm.bias)
        return self.node("LayerNormalization", x, weight, bias, output=output, epsilon=norm.eps)

    def gelu(self, x: str) -> str:
        """Exact GELU in the form that ONNX Runtime recognises and runs as one kernel."""
        erf = self.node("Erf", self.node("Div", x, self.constant(math.sqrt(2.0))))
        product = self.node("Mul", x, self.node("Add", erf, self.constant(1.0)))
        return self.node("Mul", product, self.constant(0.5))

    def normalise(self, x: str, output: str) -> str:
        """L2 normalisation over the last axis; zero vectors stay zero, as in torch."""
        length = self.node("ReduceL2", x, axes=[-1], keepdims=1)
        return self.node("Div", x, self.node("Max", length, self.constant(1e-12)), output=output)


def build_graph(
    backbone: XLMRobertaBackbone,
    heads: EmbeddingHeads,
    store: Store,
    special_ids: Sequence[int] = (),
    projection: torch.Tensor | None = None,
) -> GraphProto:
    """The graph of an encoder and the heads that it has.

    Inputs ``input_ids`` and ``attention_mask``, int64, shape ``(B, T)``; any ``B`` and ``T``.
    Outputs ``last_hidden_state`` ``(B, T, H)``, first, as Optimum's feature extraction and
    sentence-transformers read it; ``dense_vecs`` ``(B, H)``; ``token_weights`` ``(B, T)`` and
    ``colbert_vecs`` ``(B, T - 1, C)``, 0 on padding, if there is such a head. Special tokens have
    the weight 0 as well, as in BGE-M3's lexical weights. With a projection ``dense_vecs`` is
    ``(B, S)``, and repeated as ``sentence_embedding``.

    Positions are computed from the ids, as transformers does: ``pad + running count of ids that
    are not pad``; padding itself has position ``pad``. The mask plays no part in them.
    """
    builder = GraphBuilder(store)
    mask = builder.node("Cast", "attention_mask", to=builder.helper.TensorProto.FLOAT)
    hidden = _encoder(builder, backbone, mask)
    size = backbone.embeddings.LayerNorm.weight.numel()
    shapes: dict[str, list[int | str]] = {HIDDEN: [BATCH, LENGTH, size]}
    _dense(builder, hidden, mask, heads.pooling, projection)
    shapes["dense_vecs"] = [BATCH, size if projection is None else projection.shape[0]]
    if heads.sparse_linear is not None:
        _sparse(builder, hidden, mask, heads.sparse_linear, special_ids)
        shapes["token_weights"] = [BATCH, LENGTH]
    if heads.colbert_linear is not None:
        _colbert(builder, hidden, mask, heads.colbert_linear)
        shapes["colbert_vecs"] = [BATCH, AFTER_CLS, heads.colbert_linear.out_features]
    if projection is not None:
        shapes[builder.node("Identity", "dense_vecs", output=SENTENCE)] = shapes["dense_vecs"]
    types, info = builder.helper.TensorProto, builder.helper.make_tensor_value_info
    return builder.helper.make_graph(
        builder.nodes,
        "bge_pruning",
        [info(name, types.INT64, [BATCH, LENGTH]) for name in ("input_ids", "attention_mask")],
        [info(name, types.FLOAT, shape) for name, shape in shapes.items()],
        list(builder.weights.values()),
    )


def _encoder(builder: GraphBuilder, backbone: XLMRobertaBackbone, mask: str) -> str:
    x = _embed(builder, backbone)
    closed = builder.node("Sub", builder.constant(1.0), mask)
    bias = builder.node("Mul", closed, builder.constant(float(torch.finfo(torch.float32).min)))
    bias = builder.node("Unsqueeze", bias, builder.constant([1, 2], np.int64))  # (B, 1, 1, T)
    layers = backbone.encoder.layer
    for index, layer in enumerate(layers):
        output = HIDDEN if index == len(layers) - 1 else None
        x = _layer(builder, x, bias, layer, f"encoder.layer.{index}", output)
    return x


def _embed(builder: GraphBuilder, backbone: XLMRobertaBackbone) -> str:
    tables = backbone.embeddings
    pad = builder.constant(tables.pad_token_id, np.int64)
    real = builder.node("Not", builder.node("Equal", "input_ids", pad))
    real = builder.node("Cast", real, to=builder.helper.TensorProto.INT64)
    count = builder.node("CumSum", real, builder.constant(1, np.int64))
    positions = builder.node("Add", builder.node("Mul", count, real), pad)
    name = "embeddings.{}_embeddings.weight".format
    words = builder.weight(name("word"), tables.word_embeddings.weight)
    places = builder.weight(name("position"), tables.position_embeddings.weight)
    kind = builder.weight(name("token_type"), tables.token_type_embeddings.weight[0])
    u = builder.node("Add", builder.node("Gather", words, "input_ids"), kind)
    u = builder.node("Add", u, builder.node("Gather", places, positions))
    return builder.layer_norm(u, "embeddings.LayerNorm", tables.LayerNorm)


def _layer(
    builder: GraphBuilder, x: str, bias: str, layer: Layer, name: str, output: str | None
) -> str:
    context = _attend(builder, x, bias, layer, f"{name}.attention.self")
    attended = layer.attention.output
    y = builder.linear(context, f"{name}.attention.output.dense", attended.dense)
    norm = f"{name}.attention.output.LayerNorm"
    h = builder.layer_norm(builder.node("Add", y, x), norm, attended.LayerNorm)
    units = builder.linear(h, f"{name}.intermediate.dense", layer.intermediate.dense)
    y = builder.linear(builder.gelu(units), f"{name}.output.dense", layer.output.dense)
    norm = f"{name}.output.LayerNorm"
    return builder.layer_norm(builder.node("Add", y, h), norm, layer.output.LayerNorm, output)


def _attend(builder: GraphBuilder, x: str, bias: str, layer: Layer, name: str) -> str:
    """Scaled dot-product attention; shape ``(B, T, A * D)``."""
    module = layer.attention.self
    heads = module.query.out_features // module.head_dim
    apart = builder.constant([0, 0, heads, module.head_dim], np.int64)  # 0 keeps a size

    def split(projection: str, order: list[int]) -> str:
        y = builder.linear(x, f"{name}.{projection}", getattr(module, projection))
        return builder.node("Transpose", builder.node("Reshape", y, apart), perm=order)

    query, key = split("query", [0, 2, 1, 3]), split("key", [0, 2, 3, 1])  # (B, A, D, T)
    scale = builder.constant(1.0 / math.sqrt(module.head_dim))
    scores = builder.node("Mul", builder.node("MatMul", query, key), scale)
    shares = builder.node("Softmax", builder.node("Add", scores, bias), axis=-1)
    context = builder.node("MatMul", shares, split("value", [0, 2, 1, 3]))
    context = builder.node("Transpose", context, perm=[0, 2, 1, 3])  # (B, T, A, D)
    together = builder.constant([0, 0, heads * module.head_dim], np.int64)
    return builder.node("Reshape", context, together)


def _dense(
    builder: GraphBuilder, hidden: str, mask: str, pooling: str, projection: torch.Tensor | None
) -> None:
    if pooling == "cls":
        pooled = builder.node("Gather", hidden, builder.constant(0, np.int64), axis=1)
    else:
        column = builder.node("Unsqueeze", mask, builder.constant([-1], np.int64))  # (B, T, 1)
        axis = builder.constant([1], np.int64)
        total = builder.node("ReduceSum", builder.node("Mul", hidden, column), axis, keepdims=0)
        count = builder.node("ReduceSum", column, axis, keepdims=0)
        count = builder.node("Max", count, builder.constant(1e-9))
        pooled = builder.node("Div", total, count)
    if projection is not None:
        weight = builder.weight(f"{PROJECTION}.weight", projection.T)
        pooled = builder.node("MatMul", pooled, weight, output=PROJECTION)
    builder.normalise(pooled, "dense_vecs")


def _sparse(
    builder: GraphBuilder, hidden: str, mask: str, layer: nn.Linear, special_ids: Sequence[int]
) -> None:
    weights = builder.node("Relu", builder.linear(hidden, "sparse_linear", layer))
    weights = builder.node("Squeeze", weights, builder.constant([-1], np.int64))
    for index in special_ids:
        special = builder.node("Equal", "input_ids", builder.constant(index, np.int64))
        weights = builder.node("Where", special, builder.constant(0.0), weights)
    builder.node("Mul", weights, mask, output="token_weights")


def _colbert(builder: GraphBuilder, hidden: str, mask: str, layer: nn.Linear) -> None:
    one, end = builder.constant([1], np.int64), builder.constant([2**31 - 1], np.int64)
    after = builder.node("Slice", hidden, one, end, one)  # from 1 on, of axis 1: without CLS
    vectors = builder.linear(after, "colbert_linear", layer)
    real = builder.node("Slice", mask, one, end, one)
    column = builder.node("Unsqueeze", real, builder.constant([-1], np.int64))
    builder.normalise(builder.node("Mul", vectors, column), "colbert_vecs")
