"""Fits a cut encoder to the one that it was cut from, layer by layer, without gradients.

The contribution of a sublayer to the residual stream is linear in its heads or units. When some are
removed, least squares finds the output projection with which the others best approximate the
whole sublayer. Layers are fitted one after the other on the states that the cut encoder itself
computes, so that each also compensates the errors of those before it:

``dense(inner) -> u_teacher - residual_student``, where ``u`` is the input of the LayerNorm.

Tokens are weighted by what the teacher's outputs feel of them, see
:mod:`bge_pruning.selection.sensitivity`. The last sublayer before removed layers
replaces them: it is fitted to, and gets the LayerNorm of, the teacher's layer just before the next
one that is kept. No other weight changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bge_pruning.models.bge_m3_backbone import Layer, ResidualOutput, XLMRobertaBackbone
from bge_pruning.models.objective import following_layers
from bge_pruning.models.packing import Packing, compute_packing
from bge_pruning.selection.least_squares import Moments, fit_
from bge_pruning.selection.sensitivity import WeighedTexts


@dataclass
class _Piece:
    """A batch on its way through both encoders; states of packed tokens, shape ``(N, H)``.

    ``teacher`` is the input of the teacher's next layer; ``middle`` and ``end`` are those of the
    two LayerNorms of its last computed layer.
    """

    packing: Packing
    weights: dict[ResidualOutput, Tensor]
    student: Tensor
    teacher: Tensor
    middle: Tensor | None = None
    end: Tensor | None = None


@torch.no_grad()
def refit_(
    student: XLMRobertaBackbone,
    teacher: XLMRobertaBackbone,
    layers: Sequence[int],
    hidden: Sequence[int],
    texts: Sequence[WeighedTexts],
) -> None:
    """Fit the output projections of a cut encoder in place; both are in evaluation mode.

    Args:
        layers: Layers of the teacher that the student has, ascending.
        hidden: Dimensions of the teacher that it has, ascending.
        texts: As :func:`weigh_tokens` of the teacher gives them, on the device of both encoders.
    """
    kept = torch.tensor(hidden, device=student.embeddings.word_embeddings.weight.device)
    survives = torch.zeros(len(teacher.encoder.layer), dtype=torch.bool)
    survives[list(layers)] = True
    following = following_layers(survives).tolist()
    pieces = [_embed(student, teacher, part) for part in texts]
    depth = 0
    for layer, place in zip(student.encoder.layer, layers, strict=True):
        _advance(teacher, pieces, depth, place + 1)
        _fit_attention(layer, teacher.encoder.layer[place], pieces, kept)
        depth = following[place] + 1
        _advance(teacher, pieces, place + 1, depth)
        _fit_feed_forward(layer, teacher.encoder.layer[following[place]], pieces, kept)


def _embed(student: XLMRobertaBackbone, teacher: XLMRobertaBackbone, texts: WeighedTexts) -> _Piece:
    packing = compute_packing(texts.mask)
    states = (model.embeddings(texts.ids, packing, None) for model in (student, teacher))
    return _Piece(packing, texts.weights, *states)


def _advance(teacher: XLMRobertaBackbone, pieces: Sequence[_Piece], start: int, end: int) -> None:
    """Compute some of the teacher's layers."""
    for layer in teacher.encoder.layer[start:end]:
        for piece in pieces:
            context = layer.attention.self(piece.teacher, piece.packing)
            piece.middle = piece.teacher + layer.attention.output.dense(context)
            h = layer.attention.output.LayerNorm(piece.middle)
            piece.end = h + layer.output.dense(layer.intermediate(h))
            piece.teacher = layer.output.LayerNorm(piece.end)


def _fit_attention(layer: Layer, wanted: Layer, pieces: Sequence[_Piece], kept: Tensor) -> None:
    """Fit the first half of a layer, and advance the student's states through it."""
    output = layer.attention.output
    moments = Moments(output.dense.in_features, output.dense.out_features, kept.device)
    contexts = [layer.attention.self(piece.student, piece.packing) for piece in pieces]
    for piece, context in zip(pieces, contexts, strict=True):
        weights = piece.weights[wanted.attention.output]
        moments.add(context, piece.middle[:, kept] - piece.student, weights)
    fit_(output.dense, moments)
    for piece, context in zip(pieces, contexts, strict=True):
        piece.student = output(context, piece.student, None, None)


def _fit_feed_forward(layer: Layer, wanted: Layer, pieces: Sequence[_Piece], kept: Tensor) -> None:
    """Fit the second half of a layer, and advance the student's states through it.

    There are many units, so they are computed twice rather than kept for all pieces.
    """
    output = layer.output
    moments = Moments(output.dense.in_features, output.dense.out_features, kept.device)
    for piece in pieces:
        wanted_output = piece.end[:, kept] - piece.student
        weights = piece.weights[wanted.output]
        moments.add(layer.intermediate(piece.student), wanted_output, weights)
    fit_(output.dense, moments)
    norm = wanted.output.LayerNorm
    output.LayerNorm.weight.copy_(norm.weight[kept])
    output.LayerNorm.bias.copy_(norm.bias[kept])
    for piece in pieces:
        piece.student = output(layer.intermediate(piece.student), piece.student, None, None)
