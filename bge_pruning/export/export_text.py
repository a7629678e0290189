"""What was measured about an exported model, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe_loss(loss: Mapping[str, Any]) -> str:
    """One line about what int8 loses and gains.

    Args:
        loss: See :func:`bge_pruning.export.onnx_quantize.measure_int8`.
    """
    dense, speed = loss["cosine"]["dense_vecs"], loss["speed"]
    text = (
        f"cosine to float32 {dense['mean']:.4f} (lowest {dense['min']:.4f} of {loss['texts']} "
        f"texts), {speed['throughput_texts_per_s']['ratio']:.2f} times the texts per second, "
        f"{speed['latency_ms']['ratio']:.2f} times the time of one text"
    )
    spearman = loss["spearman"]
    if spearman is not None:
        text += f", Spearman {spearman['int8']:.4f} (float32 {spearman['float32']:.4f})"
    return text


def render_compatibility(result: Mapping[str, Any]) -> str:
    """How well a new model searches an old one's index, in two lines.

    Args:
        result: See :func:`bge_pruning.evaluation.index_compatibility.compare_index`.
    """
    low, high = result["agreement_interval"]
    cosine = result["cosine"]
    return (
        f"Of the {result['top_k']} best passages of a query the new model finds "
        f"{result['agreement']:.1%} (95 % interval {low:.1%} to {high:.1%}; chance "
        f"{result['chance']:.1%}) in the old model's index of {result['passages']:,} passages; the "
        f"best one is the same for {result['same_first']:.1%} of {result['queries']:,} queries.\n"
        f"Cosine of the two models' vectors of a query: {cosine['mean']:.4f} on average, above "
        f"{cosine['p5']:.4f} for 95 %."
    )
