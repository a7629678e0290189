"""What a quantised graph loses and gains beside the float32 one, on real sentences."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bge_pruning.evaluation.onnx_encoder import OnnxEncoder
from bge_pruning.export.validation import VALIDATION_SENTENCES
from bge_pruning.utils.model_analysis import measure_speed

# First sentences, second sentences, gold scores.
Pairs = tuple[Sequence[str], Sequence[str], Sequence[float]]


def measure_int8(
    int8: OnnxEncoder, float32: OnnxEncoder, pairs: Pairs | None = None, rounds: int = 7
) -> dict[str, Any]:
    """Compare two files of one model.

    Args:
        int8: The quantised file.
        float32: The file it was made from.
        pairs: Texts to compare on, with gold scores.
        rounds: Measurements of speed, see :func:`measure_speed`.

    Returns:
        ``texts`` compared; ``cosine`` of the two files' vectors by output, ``mean`` and ``min``
        (of a text for ``dense_vecs`` and ``token_weights``, of a token for ``colbert_vecs``);
        ``spearman`` of the dense similarities with the gold scores (``float32``, ``int8``,
        ``change``, ``pairs``), or ``None``; ``speed``; ``versions``.

    Raises:
        ValueError: If an output is not finite.
    """
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
