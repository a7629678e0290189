"""What ``pruning.json`` records: sizes, kept indices, and how near the gates were to the cut."""

from __future__ import annotations

import logging
from dataclasses import asdict

import torch

from bge_pruning.model_io.checkpoint import TrainedModel
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters, forward_flops
from bge_pruning.models.l0_module_embedding import BUDGET, OPERATIONS, L0Module
from bge_pruning.models.structural_pruning import SHAPE_FIELDS, KeepIndices
from bge_pruning.utils import records

log = logging.getLogger(__name__)

# Every extracted folder holds this file.
MARKER = "pruning.json"
# A run whose gates end further from the target than this was not finished by the gates.
FAR_FROM_TARGET = 0.01


def build_record(
    model: TrainedModel, shape: EncoderShape, keep: KeepIndices, method: str = "l0"
) -> records.PruningRecord:
    """Content of ``pruning.json``, as far as the checkpoint knows it.

    Indices are in the source's numbering. A recovery run inherits what the pruning run decided. The
    ``source`` has a ``projection`` if its dense vectors are not those of its encoder, which was
    trained.
    """
    metadata = model.metadata
    cuts = model.l0_module is not None or shape != model.shape
    record = records.PruningRecord(
        source=records.Source(
            base_model=metadata.base_model,
            revision=metadata.revision,
            license=metadata.license,
            origin=metadata.origin,
        ),
        source_shape=as_shape(model.shape),
        shape=as_shape(shape),
        parameters=records.PrunedParameters(
            source=as_parameters(model.shape), extracted=as_parameters(shape)
        ),
        kept=records.Kept(**keep.as_dict()),
        constraint={},
        seed=metadata.seed,
        batches={"train": model.batch},
        pooling=metadata.pooling,
        max_seq_length=metadata.max_seq_length,
        versions=metadata.versions,
    )
    if cuts:  # a baseline without a step of training
        record.method, record.batches = method, {}
    if model.l0_module is not None:
        record.constraint = compute_constraint_report(model.l0_module, shape)
        record.batches = {"prune": model.batch}
    if metadata.source_pruning is not None:
        _inherit(record, records.PruningRecord(**metadata.source_pruning), model, cuts)
    return record


def _inherit(
    record: records.PruningRecord, earlier: records.PruningRecord, model: TrainedModel, cuts: bool
) -> None:
    """Take over what the run before has decided: for a recovery, what was cut and from what."""
    if earlier.projection is not None:
        record.source.projection = earlier.projection
    if cuts:
        return
    for key in ("source", "source_shape", "kept", "method", "constraint"):
        if key in earlier.model_fields_set:
            setattr(record, key, getattr(earlier, key))
    record.parameters.source = earlier.parameters.source
    record.batches = {**earlier.batches, "recover": model.batch}
    if texts := model.metadata.refit_texts or earlier.refit_texts:
        record.refit_texts = texts


def as_shape(shape: EncoderShape) -> records.Shape:
    """Sizes as a record."""
    return records.Shape(**asdict(shape))


def as_parameters(shape: EncoderShape) -> records.Parameters:
    """Parameters of a model of these sizes, as a record."""
    return records.Parameters(**count_parameters(shape).as_dict())


@torch.no_grad()
def compute_constraint_report(
    l0_module: L0Module, shape: EncoderShape
) -> dict[str, records.Constraint]:
    """How far the gates at the end of training were from what is cut, per axis.

    Further keys are ``encoder``, the share of parameters, and ``operations`` if they are to be
    fewer; ``largest_distance`` is that of any layer from the realised sparsity.
    """
    source = l0_module.shape
    realised = {
        axis: 1.0 - getattr(shape, SHAPE_FIELDS[axis]) / getattr(source, SHAPE_FIELDS[axis])
        for axis in l0_module.axes
    }
    realised[BUDGET] = 1.0 - count_parameters(shape).encoder / count_parameters(source).encoder
    if l0_module.target_speedup is not None:
        length = [l0_module.target_length]
        realised[OPERATIONS] = 1.0 - forward_flops(shape, length) / forward_flops(source, length)
    targets = {**realised, **l0_module.final_targets()}
    return {
        axis: records.Constraint(
            expected_sparsity=float(expected.mean()),
            target_sparsity=float(targets[axis]),
            realised_sparsity=float(realised[axis]),
            largest_distance=float((expected - realised[axis]).abs().max()),
        )
        for axis, expected in l0_module.expected_sparsity().items()
    }


def warn_if_far(constraint: dict[str, records.Constraint]) -> None:
    """Say so, in one line, if the gates of a run ended far from its target."""
    far = {a: row for a, row in constraint.items() if row.largest_distance > FAR_FROM_TARGET}
    if far:
        rows = [
            f"'{axis}' by {100 * row.largest_distance:.1f} points of sparsity (expected "
            f"{row.expected_sparsity:.3f} on average, cut {row.realised_sparsity:.3f})"
            for axis, row in far.items()
        ]
        log.warning(
            "the gates were far from what is cut, %s: the run ended before the constraint was met. "
            "Train longer, or raise optimizer.lambda_2_lr.",
            ", ".join(rows),
        )
