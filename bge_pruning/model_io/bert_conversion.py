"""BERT as XLM-RoBERTa: the same architecture with other tables.

Many small and multilingual sentence encoders are BERT; BGE-M3 is XLM-RoBERTa. Both compute the same
function of one text once three differences are settled:

* XLM-RoBERTa numbers positions from ``pad_token_id + 1``, BERT from 0: the table moves down;
* XLM-RoBERTa has one token type: row 0, the only one that a single text uses, stays;
* XLM-RoBERTa finds padding by token id, BERT by the attention mask alone: a text that *spells* the
  padding token is outside the equality, every other text is inside it. So the padding token has to
  be the tokenizer's own, whatever BERT's ``config.json`` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bge_pruning.datasets.embedding_dataset import build_tokenizer, pad_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-5
POSITION_TABLE = "embeddings.position_embeddings.weight"
TOKEN_TYPE_TABLE = "embeddings.token_type_embeddings.weight"
# Padding tokens of tokenizers that do not name theirs.
PADDING = ("<pad>", "[PAD]")
# The shortest text and a usual one; one that is cut at the last row of the position table.
SHORT = ("No.", "Pruning removes whole layers, heads and units.")
LONG = "every position has its own row "


@dataclass(frozen=True)
class BertFiles:
    """What a BERT folder holds: ``config.json`` and the weights by name, float32."""

    config: dict[str, Any]
    state: dict[str, Tensor]


def convert_config(bert: Mapping[str, Any], pad_token_id: int) -> dict[str, Any]:
    """Map a BERT ``config.json`` to the XLM-RoBERTa one of the same architecture.

    Args:
        pad_token_id: Id of the tokenizer's padding token.
    """
    return {
        **bert,
        "model_type": "xlm-roberta",
        "architectures": ["XLMRobertaModel"],
        "max_position_embeddings": bert["max_position_embeddings"] + pad_token_id + 1,
        "type_vocab_size": 1,
        "pad_token_id": pad_token_id,
    }


def convert_state_dict(state: Mapping[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Reshape BERT weights for XLM-RoBERTa.

    The two architectures share all names, so only tables change: positions from ``(P, H)`` to
    ``(P + pad_token_id + 1, H)``, token types to ``(1, H)``. The new position rows belong to no
    token of a text and are zero.
    """
    converted = dict(state)
    if (positions := state.get(POSITION_TABLE)) is not None:
        unused = positions.new_zeros(pad_token_id + 1, *positions.shape[1:])
        converted[POSITION_TABLE] = torch.cat([unused, positions])
    if (types := state.get(TOKEN_TYPE_TABLE)) is not None:
        converted[TOKEN_TYPE_TABLE] = types[:1].clone()
    return converted


def verify_conversion(
    bert: BertFiles,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    tokenizer_json: bytes,
    source: str,
) -> float:
    """Compute texts with transformers' own BERT, and with its XLM-RoBERTa on what was made of it.

    Returns the largest difference of the hidden states of real tokens, at most ``TOLERANCE``.

    Raises:
        ValueError: If they differ by more.
    """
    from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

    pooler = "pooler.dense.weight" in state
    with torch.device("meta"):
        first = BertModel(BertConfig(**bert.config), add_pooling_layer=pooler)
        second = XLMRobertaModel(XLMRobertaConfig(**config), add_pooling_layer=pooler)
    try:
        first.load_state_dict(bert.state, strict=True, assign=True)
        second.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{source}: checkpoint and model disagree: {reason}. To fix, use the weights and the "
            f"config of the same model."
        ) from error
    tokenizer = build_tokenizer(tokenizer_json, bert.config["max_position_embeddings"])
    texts = (SHORT, (LONG * tokenizer.truncation["max_length"],))
    rows = [[np.array(tokenizer.encode(t).ids) for t in part] for part in texts]
    batches = [pad_texts(part, config["pad_token_id"]) for part in rows]
    difference = compute_largest_difference(first.eval(), second.eval(), batches)
    if not difference <= TOLERANCE:  # NaN must fail too
        raise ValueError(
            f"{source}: BERT's hidden states and those of the XLM-RoBERTa made of it differ by "
            f"{difference:.2e}, expected at most {TOLERANCE:.0e}. To fix, check that the model is "
            f"a plain BertModel with finite weights and its own tokenizer."
        )
    return difference


@torch.no_grad()
def compute_largest_difference(
    first: PreTrainedModel, second: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]]
) -> float:
    """Largest difference of the hidden states of real tokens, NaN if any of them is.

    Args:
        first: A BERT, whose positions are counted from 0.
        batches: ``input_ids`` and ``attention_mask``, shape ``(B, T)``.
    """
    differences = []
    for ids, mask in batches:
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        # Spelled out, since models built without memory lack BERT's tables of them.
        positions = torch.arange(ids.shape[1])[None]
        expected = first(**inputs, position_ids=positions).last_hidden_state
        delta = (second(**inputs).last_hidden_state - expected)[mask.bool()]
        differences.append(delta.abs().max())  # Tensor.max keeps NaN, Python's max may not
    return torch.stack(differences).max().item()
