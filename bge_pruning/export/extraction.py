"""From a masked model to an ordinary, smaller one.

The gates are binary, so extraction only slices: every kept weight is unchanged. What else is asked
for (fewer tokens, a square multi-vector head, another precision) is done to the masked model, so
that one law holds for all of it: masked == extracted.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bge_pruning.export.compact_head import square_head
from bge_pruning.export.pruning_record import as_parameters, as_shape, build_record, warn_if_far
from bge_pruning.export.validation import (
    TOLERANCE,
    References,
    ValidationError,
    compute_references,
    in_float64,
    tokenize_sentences,
)
from bge_pruning.export.vocabulary import KeptVocabulary, trim_vocabulary
from bge_pruning.export.vocabulary_files import read_tokenizer, rewrite_tokenizer_files
from bge_pruning.model_io.checkpoint import as_base_model, cut, final_gates, load_trained_model
from bge_pruning.model_io.model_folder import (
    dtype_name,
    precision_loss,
    round_weights,
    write_model_folder,
)
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models import structural_pruning
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.selection.nested_shapes import masks_of_indices, relative_indices
from bge_pruning.utils import records


@dataclass
class Extraction:
    """A masked model on its way to a folder; its ``masks`` say what of it stays."""

    base: BaseModel
    masks: structural_pruning.PruningMasks
    keep: structural_pruning.KeepIndices
    shape: EncoderShape
    info: records.PruningRecord
    vocabulary: KeptVocabulary | None = None


def start_extraction(checkpoint: Path, shape: EncoderShape | None = None) -> Extraction:
    """Read a checkpoint and decide what is cut: to ``shape``, or else to the run's target."""
    model = load_trained_model(checkpoint)
    masks, target = final_gates(model)
    if shape is not None and shape != target:
        masks, target = model.l0_module.masks_of(shape), shape
    keep = model.backbone.keep_indices(masks)
    info = build_record(model, target, keep)
    if shape is None and model.l0_module is not None:
        warn_if_far(info.constraint)
    info.checkpoint = str(checkpoint)
    return Extraction(as_base_model(model, str(checkpoint)), masks, keep, target, info)


def keep_tokens(extraction: Extraction, vocabulary: KeptVocabulary) -> None:
    """Have only these tokens written."""
    extraction.vocabulary = vocabulary
    _set_shape(extraction, vocab_size=len(vocabulary))


@torch.no_grad()
def make_head_square(extraction: Extraction) -> None:
    """Give the masked model a multi-vector head as wide as the hidden size, if it has another.

    See :mod:`bge_pruning.export.compact_head`. The record gets ``multi_vector``: ``source_dim``,
    ``colbert_dim`` and ``largest_difference`` of the products of all vectors of the validation
    sentences.
    """
    heads, hidden = extraction.base.heads, extraction.shape.hidden_size
    if heads.colbert_linear is None:
        raise ValueError(
            "the model has no multi-vector head to make square. To fix, leave --colbert-dim out."
        )
    wide = heads.colbert_linear.out_features
    if wide == hidden:
        return
    sentences = _tokenize(extraction)
    before = _references(extraction, sentences)
    heads.colbert_linear = _square_head(extraction)
    difference = _largest_change_of_products(before, _references(extraction, sentences))
    if not difference <= TOLERANCE:
        raise ValidationError(
            f"the square multi-vector head moves a score by {difference:.1e}, more than "
            f"{TOLERANCE:.0e}. To fix, leave --colbert-dim out, and report it with the checkpoint."
        )
    extraction.info.multi_vector = records.MultiVector(
        source_dim=wide, colbert_dim=hidden, largest_difference=difference
    )
    _set_shape(extraction, colbert_dim=hidden)


def _square_head(extraction: Extraction) -> torch.nn.Linear:
    """A head for the masked model: zeros in the columns of the dimensions that go."""
    base, keep = extraction.base, extraction.keep
    wide = base.heads.colbert_linear
    # The cut model's head and last LayerNorm.
    head = copy.deepcopy(wide)
    norm = copy.deepcopy(base.backbone.encoder.layer[keep.layer[-1]].output.LayerNorm)
    structural_pruning.prune_linear(head, keep.hidden, dim=1)
    structural_pruning.prune_layer_norm(norm, keep.hidden)
    small = square_head(head, norm)
    square = torch.nn.Linear(wide.in_features, small.out_features)
    square.weight.zero_()
    square.weight[:, keep.hidden] = small.weight
    square.bias.copy_(small.bias)
    return square


def _largest_change_of_products(before: References, after: References) -> float:
    def products(references: References) -> torch.Tensor:
        vectors = references.outputs["colbert_vecs"].flatten(0, 1)
        return vectors @ vectors.T

    return float((products(after) - products(before)).abs().max())


def _set_shape(extraction: Extraction, **sizes: int) -> None:
    extraction.shape = replace(extraction.shape, **sizes)
    extraction.info.shape = as_shape(extraction.shape)
    extraction.info.parameters.extracted = as_parameters(extraction.shape)


@dataclass(frozen=True)
class Sentences:
    """The validation sentences, tokenised.

    Attributes:
        written: As the written folder's tokenizer gives them.
        read: The same tokens by their ids in the model that is not trimmed yet.
    """

    written: dict[str, torch.Tensor]
    read: dict[str, torch.Tensor]


def _tokenize(extraction: Extraction) -> Sentences:
    base, vocabulary = extraction.base, extraction.vocabulary
    files = base.tokenizer_files
    if vocabulary is not None:
        files = rewrite_tokenizer_files(read_tokenizer(files), files, vocabulary.old_ids)
    inputs = tokenize_sentences(files, base.hf_config["pad_token_id"], base.max_seq_length)
    if vocabulary is None:
        return Sentences(inputs, inputs)
    old_ids = torch.from_numpy(vocabulary.old_ids)
    return Sentences(inputs, {**inputs, "input_ids": old_ids[inputs["input_ids"]]})


def _references(extraction: Extraction, sentences: Sentences) -> References:
    """Of the masked model with all its tokens."""
    masked = (extraction.base.backbone, extraction.base.heads, extraction.masks)
    found = compute_references(*masked, sentences.read, extraction.keep.hidden)
    return replace(found, inputs=sentences.written)


def write_extraction(
    extraction: Extraction, folder: Path, dtype: torch.dtype = torch.float32
) -> References:
    """Cut the model of an extraction, which is used up, and write its folder.

    Below float32 the record gets ``precision``: ``dtype`` and ``rounding``
    (:func:`precision_loss`). Returns the outputs of the masked model, with rounded weights if they
    are written so.
    """
    base = extraction.base
    sentences = _tokenize(extraction)
    references = _references(extraction, sentences)
    if dtype != torch.float32:
        exact = references.outputs
        # The law holds for the rounded model as for any other: masked == extracted.
        round_weights(base.backbone, base.heads, dtype)
        references = _references(extraction, sentences)
        rounding = records.Rounding(**precision_loss(exact, references.outputs))
        extraction.info.precision = records.Precision(dtype=dtype_name(dtype), rounding=rounding)
    with in_float64(base.backbone, base.heads):
        references = replace(references, exact=_references(extraction, sentences))
    if extraction.vocabulary is not None:
        base = extraction.base = trim_vocabulary(base, extraction.vocabulary)
    cut(base.backbone, base.heads, extraction.keep)
    _check_counts(base, extraction.shape)
    write_model_folder(
        folder,
        base.backbone,
        base.heads,
        extraction.shape,
        base.hf_config,
        base.tokenizer_files,
        base.max_seq_length,
        base.prompts,
        dtype,
    )
    return references


def _check_counts(base: BaseModel, shape: EncoderShape) -> None:
    expected = count_parameters(shape)
    real = replace(
        base.backbone.count_parameters(), heads=sum(p.numel() for p in base.heads.parameters())
    )
    if real != expected:
        raise ValidationError(
            f"the cut model has {real}, but its shape should have {expected}. To fix, report it "
            f"with the checkpoint: it is a defect of extraction."
        )


def describe(info: records.PruningRecord) -> str:
    """One line about an extraction: sizes, parameters, vectors, precision, largest difference."""
    source, extracted = info.parameters.source, info.parameters.extracted
    shape = EncoderShape(**info.shape.as_dict())
    dense = info.projection.dimensions if info.projection else shape.hidden_size
    exact = info.largest_difference_float64
    in_double = "" if exact is None else f" in float32, {exact:.1e} in float64"
    vectors = f"dense vectors of {dense}"
    if shape.colbert_dim:
        vectors += f", multi-vectors of {shape.colbert_dim}"
    return (
        f"{shape.describe()}; {extracted.encoder:,} encoder parameters "
        f"({extracted.encoder / source.encoder:.1%} of the source), {extracted.total:,} in all in "
        f"{info.precision.dtype if info.precision else 'float32'}; {vectors}; largest difference "
        f"from the masked model {info.largest_difference:.1e}{in_double}"
    )


def nested_extraction(
    larger: Extraction,
    keep: structural_pruning.KeepIndices,
    shape: EncoderShape,
    constraint: dict[str, records.Constraint],
) -> Extraction:
    """Cut a smaller sub-network out of a larger one of the same gates, as it was trained on.

    What stays is in the numbering of the unpruned model.
    """
    relative = relative_indices(keep, structural_pruning.KeepIndices(**larger.info.kept.as_dict()))
    batches = dict(larger.info.batches)
    steps = batches.pop("recover", 0) + batches.pop("recover_larger", 0)
    info = larger.info.model_copy(deep=True)
    info.shape = as_shape(shape)
    info.kept = records.Kept(**keep.as_dict())
    info.constraint = constraint
    info.parameters.extracted = as_parameters(shape)
    info.batches = {**batches, "recover_larger": steps}
    masks = masks_of_indices(relative, larger.shape)
    return Extraction(larger.base, masks, relative, shape, info)
