"""Whether trainings fit into memory together, said before they are built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.step_memory import step_memory
from bge_pruning.reports.training_cost import COMPILED, PLAIN, TEACHER, TRAININGS

HALVINGS = 12
# What the allocator keeps; a process of BGE-M3's size grew to 1.05 times the sum of its tensors.
MARGIN = 1.1


def compute_needed_bytes(
    shape: EncoderShape, names: Sequence[str], tokens: int, padded: int, half: bool
) -> float:
    """Bytes that trainings need that take turns.

    Each keeps its weights and moments; activations and gradients are there of one at a time.

    Args:
        shape: Sizes of the model.
        names: Of the trainings.
        tokens: Real tokens of the largest batch; ours computes nothing for the others.
        padded: With its padding.
        half: With 16-bit autocast.
    """
    # Compiled layers compute padding too where there is no kernel for texts of any lengths.
    counts = {n: padded if n in (PLAIN, COMPILED) else tokens for n in names}
    parts = [step_memory(shape, counts[n], n != PLAIN, n == TEACHER, half) for n in names]
    kept = sum(part["weights and optimizer"] + part["teacher"] for part in parts)
    return MARGIN * (kept + max(part["activations or gradients"] for part in parts))


def check_memory(
    shape: EncoderShape, names: Sequence[str], tokens: int, padded: int, half: bool, free: float
) -> None:
    """Refuse trainings that do not fit together.

    Args:
        shape: Sizes of the model.
        names: Of the trainings.
        tokens: Real tokens of the largest batch.
        padded: With its padding.
        half: With 16-bit autocast.
        free: Bytes that they may take.

    Raises:
        ValueError: If they do not fit; the message says what would.
    """
    needed = compute_needed_bytes(shape, names, tokens, padded, half)
    if needed <= free:
        return
    advice = [
        *_fewer_trainings(shape, names, tokens, padded, half, free),
        *_smaller_batches(shape, names, tokens, padded, half, free),
    ] or ["choose a smaller model, or a machine with more memory"]
    raise ValueError(
        f"{len(names)} training{'s' * (len(names) > 1)} ({', '.join(names)}) of this model would "
        f"take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. To fix, "
        f"{', or '.join(advice)}."
    )


def _fewer_trainings(
    shape: EncoderShape, names: Sequence[str], tokens: int, padded: int, half: bool, free: float
) -> Iterator[str]:
    ordered = [name for name in TRAININGS if name in names]
    for count in range(len(names) - 1, 0, -1):
        for fewer in combinations(ordered, count):
            needed = compute_needed_bytes(shape, fewer, tokens, padded, half)
            if needed <= free:
                yield f"pass --trainings {' '.join(fewer)} ({needed / 1e9:.1f} GB)"
                return


def _smaller_batches(
    shape: EncoderShape, names: Sequence[str], tokens: int, padded: int, half: bool, free: float
) -> Iterator[str]:
    for power in range(1, HALVINGS):
        less = [count >> power for count in (tokens, padded)]
        if min(less) and compute_needed_bytes(shape, names, *less, half) <= free:
            yield (
                f"lower --batch-size, --max-length and --fixed-length to {less[1]:,} tokens a "
                f"batch (now {padded:,})"
            )
            return
