"""The frozen model that a student is distilled from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.structural_pruning import PruningMasks

HIDDEN = "hidden_states"
LAST = "last_states"


def compute_outputs(
    backbone: XLMRobertaBackbone,
    heads: EmbeddingHeads,
    input_ids: Tensor,
    attention_mask: Tensor,
    names: Sequence[str],
    masks: PruningMasks | None = None,
    lengths: Sequence[int] | None = None,
    half: bool = False,
) -> dict[str, Tensor]:
    """Compute outputs of a model by name, see :meth:`EmbeddingHeads.outputs`.

    ``hidden_states`` are those after every layer, ``(B, L, T, H)``, ``last_states`` those after the
    last one, ``(B, T, H)``. For ``lengths`` see
    :func:`bge_pruning.models.packing.compute_packing`. With ``half`` the products of the layers are
    computed in bfloat16; states and heads stay in float32.
    """
    with torch.autocast(input_ids.device.type, torch.bfloat16) if half else nullcontext():
        states, packing = backbone.encode(
            input_ids, attention_mask, masks, lengths, every_layer=HIDDEN in names
        )
    named = [name for name in names if name not in (HIDDEN, LAST)]
    outputs = heads.outputs(states[-1], attention_mask, named, packing)
    if HIDDEN in names:
        outputs[HIDDEN] = torch.stack([packing.unpack(state) for state in states], dim=1)
    if LAST in names:
        outputs[LAST] = packing.unpack(states[-1])
    return outputs


class FrozenEncoder:
    """The unpruned model, embedding texts without gradient; set to evaluation mode and frozen."""

    def __init__(
        self,
        backbone: XLMRobertaBackbone,
        heads: EmbeddingHeads,
        names: Sequence[str] = ("dense_vecs",),
    ) -> None:
        if missing := sorted(set(names) - {HIDDEN, LAST, *heads.names()}):
            raise ValueError(
                f"the teacher has no {', '.join(missing)} to distil from. To fix, name a teacher "
                f"with that head (teacher.base_model), or set that part of the loss to 0."
            )
        self.backbone = backbone.eval().requires_grad_(False)
        self.heads = heads.requires_grad_(False)
        self.names = tuple(names)

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, lengths: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Outputs by name, on the device of the input, see :func:`compute_outputs`."""
        self.backbone.to(input_ids.device)
        self.heads.to(input_ids.device)
        batch = (input_ids, attention_mask)
        return compute_outputs(self.backbone, self.heads, *batch, self.names, lengths=lengths)
