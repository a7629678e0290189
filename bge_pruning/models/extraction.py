"""From a masked model to an ordinary, smaller one, and the proof that they are the same.

The gates are binary, so extraction only slices: every kept weight is unchanged.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bge_pruning.atomic_folder import atomic_folder
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.checkpoint import TrainedModel, find_checkpoint, load_trained_model
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.models.l0_module_embedding import BUDGET, SHAPE_FIELDS, L0Module
from bge_pruning.models.model_card import render_model_card
from bge_pruning.models.model_files import read_pooling
from bge_pruning.models.model_folder import write_model_folder
from bge_pruning.models.precision import dtype_name, precision_loss, round_weights
from bge_pruning.models.pretrained import load_strict, read_heads
from bge_pruning.models.quiet import no_loading_bars
from bge_pruning.models.structural_pruning import KeepIndices, PruningMasks

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
# Every extracted folder holds this file: sizes, kept indices, exact counts.
MARKER = "pruning.json"
# A run whose gates end further from the target than this was not finished by the gates.
FAR_FROM_TARGET = 0.01
VALIDATION_SENTENCES = (
    "A plane is taking off.",
    "Yes.",
    "Structured pruning removes whole layers, attention heads and intermediate units.",
    "Die Bahn kommt heute wieder eine halbe Stunde zu spät.",
    "Где находится ближайшая библиотека?",
    "今天的天气很好，我们去公园散步吧。",
    '1,024 hidden dimensions; 16 heads (64 each) - and "quoted" text, too.',
    "Embedding models turn a text into a vector, so that texts of similar meaning lie close "
    "together; a search engine compares the vector of a question with those of all passages.",
)


class ValidationError(RuntimeError):
    """The written model does not compute what the masked model computes."""


@dataclass(frozen=True)
class References:
    """Outputs of the masked model on the validation sentences."""

    inputs: dict[str, Tensor]
    hidden: Tensor
    outputs: dict[str, Tensor]


def extract(
    run_or_checkpoint: Path,
    output: Path,
    overwrite: bool = False,
    best: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Write the model of a run as an ordinary model folder, and validate it.

    Args:
        run_or_checkpoint: Run folder (its newest checkpoint) or checkpoint file.
        output: Folder to write; it appears only when it is complete and valid.
        overwrite: Replace an existing folder.
        best: Take the best checkpoint of the run folder, see :func:`find_checkpoint`.
        dtype: Precision of the written weights, see :mod:`bge_pruning.models.precision`.

    Returns:
        The content of ``pruning.json``. Below float32 it has ``precision``: ``dtype``,
        ``rounding`` (:func:`precision_loss`) and ``as_loaded``, the largest difference of dense
        vectors that were computed in that precision too.

    Raises:
        FileExistsError: If the folder exists and ``overwrite`` is false, or it holds no extracted
            model.
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the checkpoint is damaged or of another project, or a weight is beyond the
            range of ``dtype``.
        ValidationError: If any output differs by more than ``TOLERANCE`` (from the masked model
            with rounded weights, if they are), or is not finite when computed in ``dtype``.
    """
    checkpoint = find_checkpoint(run_or_checkpoint, best)
    with atomic_folder(output, MARKER, overwrite) as folder:
        model = load_trained_model(checkpoint)
        info = _cut_and_write(model, folder, dtype)
        info["checkpoint"] = str(checkpoint)
        (folder / MARKER).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(render_model_card(info), encoding="utf-8")
    log.info("wrote %s: %s", output, describe(info))
    return info


def describe(info: dict[str, Any]) -> str:
    """One line about an extraction: sizes, parameters, largest difference."""
    parameters = info["parameters"]
    share = parameters["extracted"]["encoder"] / parameters["source"]["encoder"]
    return (
        f"{EncoderShape(**info['shape']).describe()}; {parameters['extracted']['encoder']:,} "
        f"encoder parameters ({share:.1%} of the source), {parameters['extracted']['total']:,} in "
        f"all; largest difference from the masked model {info['largest_difference']:.1e}"
    )


def final_gates(model: TrainedModel) -> tuple[PruningMasks, EncoderShape]:
    """What of a model stays, and the sizes that it then has."""
    if model.l0_module is None:
        return PruningMasks(), model.shape
    return model.l0_module.deterministic_masks(), model.l0_module.realised_shape()


def _cut_and_write(model: TrainedModel, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    masks, shape = final_gates(model)
    keep = model.backbone.keep_indices(masks)
    metadata = model.metadata
    inputs = tokenize_sentences(
        metadata.tokenizer_files, metadata.hf_config["pad_token_id"], metadata.max_seq_length
    )
    references = compute_references(model.backbone, model.heads, masks, inputs)
    info = _pruning_info(model, shape, keep)
    if dtype != torch.float32:
        exact = references.outputs
        # The law holds for the rounded model as for any other: masked == extracted.
        round_weights(model.backbone, model.heads, dtype)
        references = compute_references(model.backbone, model.heads, masks, inputs)
        rounding = precision_loss(exact, references.outputs)
        info["precision"] = {"dtype": dtype_name(dtype), "rounding": rounding}
    cut(model.backbone, model.heads, keep)
    write_model_folder(
        folder,
        model.backbone,
        model.heads,
        shape,
        metadata.hf_config,
        metadata.tokenizer_files,
        metadata.max_seq_length,
        metadata.prompts,
        dtype,
    )
    difference = validate(folder, references, keep.hidden)
    if "precision" in info:
        dense = references.outputs["dense_vecs"][:, keep.hidden]
        info["precision"]["as_loaded"] = _check_as_loaded(folder, dense, dtype)
    _check_counts(model, shape)
    return {**info, "largest_difference": difference, "tolerance": TOLERANCE}


def _check_as_loaded(folder: Path, expected: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of dense vectors computed in the folder's own precision."""
    found = _sentence_transformers_vectors(folder, dtype)
    if not found.isfinite().all():
        raise ValidationError(
            f"run in {dtype_name(dtype)}, the extracted model gives vectors that are not finite: "
            f"its activations are beyond the range. To fix, write it in bf16 or fp32."
        )
    return float((found - expected).abs().max())


def cut(backbone: XLMRobertaBackbone, heads: EmbeddingHeads, keep: KeepIndices) -> None:
    """Cut encoder and heads in place."""
    backbone.prune(keep)
    heads.prune(keep.hidden)


def _check_counts(model: TrainedModel, shape: EncoderShape) -> None:
    expected = count_parameters(shape)
    real = replace(
        model.backbone.count_parameters(),
        heads=sum(p.numel() for p in model.heads.parameters()),
    )
    if real != expected:
        raise ValidationError(
            f"the cut model has {real}, but its shape should have {expected}. To fix, report it "
            f"with the checkpoint: it is a defect of extraction."
        )


@torch.no_grad()
def compute_references(
    backbone: XLMRobertaBackbone,
    heads: EmbeddingHeads,
    masks: PruningMasks,
    inputs: dict[str, Tensor],
) -> References:
    """Outputs of the masked model on tokenised sentences, in float32."""
    hidden = backbone(inputs["input_ids"], inputs["attention_mask"], masks)
    return References(inputs, hidden, heads.outputs(hidden, inputs["attention_mask"]))


def tokenize_sentences(
    tokenizer_files: dict[str, bytes], pad_token_id: int, max_length: int
) -> dict[str, Tensor]:
    """The validation sentences as ids and mask, cut where sentence-transformers cuts them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_files["tokenizer.json"].decode("utf-8"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    rows = [torch.tensor(tokenizer.encode(s).ids) for s in VALIDATION_SENTENCES]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    return {"input_ids": ids, "attention_mask": (ids != pad_token_id).long()}


@torch.no_grad()
def validate(folder: Path, references: References, kept_hidden: list[int]) -> float:
    """Load the folder with transformers and sentence-transformers and compare all outputs.

    Both compute in float32, whatever the precision of the weights.

    Args:
        folder: Written model folder.
        references: Outputs of the masked model, with weights of the folder's precision.
        kept_hidden: Hidden dimensions that the folder's model has kept.

    Returns:
        The largest difference.

    Raises:
        ValidationError: If it is above ``TOLERANCE``.
    """
    from transformers import AutoModel

    with no_loading_bars():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    mask = references.inputs["attention_mask"]
    hidden = model(**references.inputs).last_hidden_state
    real = mask.bool()
    expected = references.hidden[..., kept_hidden]
    differences = {"last_hidden_state": (hidden - expected)[real].abs().max()}
    heads = _load_heads(folder, kept_hidden)
    outputs = heads.outputs(hidden, mask)
    for name, reference in references.outputs.items():
        if name not in outputs:
            differences[name] = torch.tensor(math.inf)
            continue
        if name == "dense_vecs":
            reference = reference[:, kept_hidden]
        differences[name] = (outputs[name] - reference).abs().max()
    dense = _sentence_transformers_vectors(folder)
    reference = references.outputs["dense_vecs"][:, kept_hidden]
    differences["sentence-transformers"] = (dense - reference).abs().max()
    wrong = {name: float(d) for name, d in differences.items() if not d <= TOLERANCE}
    if wrong:
        listed = [f"{n} {'missing' if d == math.inf else f'{d:.2e}'}" for n, d in wrong.items()]
        raise ValidationError(
            f"the extracted model differs from the masked model by more than {TOLERANCE:.0e}: "
            + ", ".join(listed)
            + ". To fix, look for NaN in the weights of the run; if there are none, report it with "
            "the checkpoint: it is a defect of extraction."
        )
    return max(float(d) for d in differences.values())


def _load_heads(folder: Path, kept_hidden: list[int]) -> EmbeddingHeads:
    states = read_heads(folder)
    colbert = states["colbert_linear"]
    heads = EmbeddingHeads(
        len(kept_hidden),
        read_pooling(folder),
        sparse=states["sparse_linear"] is not None,
        colbert_dim=0 if colbert is None else colbert["weight"].shape[0],
    )
    flat = {f"{n}.{k}": v for n, state in states.items() for k, v in (state or {}).items()}
    load_strict(heads, flat, str(folder))
    return heads


def _sentence_transformers_vectors(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    from sentence_transformers import SentenceTransformer

    with no_loading_bars():
        model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    model.default_prompt_name = None  # the masked model got no prompt either
    vectors = model.encode(
        list(VALIDATION_SENTENCES), convert_to_tensor=True, show_progress_bar=False
    )
    return vectors.float().cpu()


def _pruning_info(model: TrainedModel, shape: EncoderShape, keep: KeepIndices) -> dict[str, Any]:
    """Content of ``pruning.json``."""
    metadata, earlier = model.metadata, model.metadata.source_pruning
    info = {
        "source": {
            "base_model": metadata.base_model,
            "revision": metadata.revision,
            "license": metadata.license,
            "origin": metadata.origin,
        },
        "source_shape": asdict(model.shape),
        "shape": asdict(shape),
        "parameters": {
            "source": count_parameters(model.shape).as_dict(),
            "extracted": count_parameters(shape).as_dict(),
        },
        "kept": keep.as_dict(),
        "constraint": {},
        "seed": metadata.seed,
        "batches": {"prune" if model.l0_module is not None else "train": model.batch},
        "pooling": metadata.pooling,
        "versions": metadata.versions,
    }
    if model.l0_module is not None:
        info["constraint"] = compute_constraint_report(model.l0_module, shape)
        _warn_if_far(info["constraint"])
    if earlier is not None and model.l0_module is None:
        # A recovery run: what was cut, and from what, was decided by the run before it.
        inherited = ("source", "source_shape", "kept", "constraint")
        info.update({key: earlier[key] for key in inherited})
        info["parameters"]["source"] = earlier["parameters"]["source"]
        info["batches"] = {**earlier["batches"], "recover": model.batch}
    return info


@torch.no_grad()
def compute_constraint_report(
    l0_module: L0Module, shape: EncoderShape
) -> dict[str, dict[str, float]]:
    """How far the gates were from what is cut, per axis.

    Args:
        l0_module: The gates at the end of training.
        shape: The shape that is extracted.

    Returns:
        By axis (and ``encoder``, the share of parameters): ``expected_sparsity`` (mean over
        layers), ``target_sparsity``, ``realised_sparsity``, and ``largest_distance`` of any layer
        from the realised sparsity.
    """
    source = l0_module.shape
    realised = {
        axis: 1.0 - getattr(shape, SHAPE_FIELDS[axis]) / getattr(source, SHAPE_FIELDS[axis])
        for axis in l0_module.axes
    }
    realised[BUDGET] = 1.0 - count_parameters(shape).encoder / count_parameters(source).encoder
    targets = {**realised, **l0_module.final_targets()}
    return {
        axis: {
            "expected_sparsity": float(expected.mean()),
            "target_sparsity": targets[axis],
            "realised_sparsity": realised[axis],
            "largest_distance": float((expected - realised[axis]).abs().max()),
        }
        for axis, expected in l0_module.expected_sparsity().items()
    }


def _warn_if_far(constraint: dict[str, dict[str, float]]) -> None:
    for axis, row in constraint.items():
        distance = row["largest_distance"]
        if distance > FAR_FROM_TARGET:
            log.warning(
                "the gates of '%s' were %.1f points of sparsity from what is cut (expected %.3f on "
                "average, cut %.3f): the run ended before the constraint was met. Train longer, or "
                "raise optimizer.lambda_2_lr.",
                axis,
                100 * distance,
                row["expected_sparsity"],
                row["realised_sparsity"],
            )
