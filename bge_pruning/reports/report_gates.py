"""The parts of a report about the gates: what was pruned, and how the constraint was met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bge_pruning.reports.history import AXIS_TITLES, last_constraint
from bge_pruning.reports.markdown import escape, table
from bge_pruning.reports.report_inputs import Inputs

# Above this distance, a share of the axis, the cut removed what the gates had not decided on.
WORST_DISTANCE = 0.01
UNDECIDED = (0.1, 0.9)


def render_pruned(inputs: Inputs) -> list[str]:
    """Shapes, layers, gates by axis and gates by layer; without heading and pictures."""
    parts = []
    if inputs.pruning is not None:
        before, after = inputs.pruning["source_shape"], inputs.pruning["shape"]
        rows = [[key, before.get(key, "-"), after[key]] for key in after]
        parts += [table(["shape", "original", "pruned"], rows), *render_layers(inputs.pruning)]
    if inputs.gates:
        parts.append(_gates_by_axis(inputs))
    return parts


def render_by_layer(inputs: Inputs) -> list[str]:
    """A table with a row for each layer; nothing without gates of layers, heads or units."""
    axes = [axis for axis in ("head", "intermediate") if axis in inputs.gates]
    stays = inputs.kept.get("layer")
    if not axes and "layer" not in inputs.gates:
        return []
    header = ["layer"]
    header += ["stays", "probability that it is open"] if "layer" in inputs.gates else []
    for axis in axes:
        header += [f"{AXIS_TITLES[axis]}, expected open", "kept"]
    rows = []
    for layer in range(len(inputs.gates[axes[0] if axes else "layer"])):
        gone = stays is not None and not stays[layer]
        cells: list[object] = [layer]
        if "layer" in inputs.gates:
            said = "-" if stays is None else "no" if gone else "yes"
            cells += [said, f"{inputs.gates['layer'][layer]:.3f}"]
        for axis in axes:
            mask = inputs.kept.get(axis)
            kept = "-" if mask is None or gone else f"{int(mask[layer].sum()):,}"
            cells += [f"{inputs.gates[axis][layer].sum():,.1f}", kept]
        rows.append(cells)
    return ["### Layer by layer", table(header, rows)]


def render_layers(pruning: Mapping[str, Any]) -> list[str]:
    """Which layers stay and which went; units and dimensions are too many to list.

    Args:
        pruning: Content of ``pruning.json``.
    """
    kept, count = pruning["kept"].get("layer"), pruning["source_shape"]["num_hidden_layers"]
    if kept is None or len(kept) == count:
        return []
    gone = [layer for layer in range(count) if layer not in kept]
    return [
        f"Layers that stay, counted from 0: {', '.join(map(str, kept))}. "
        f"Removed: {', '.join(map(str, gone))}."
    ]


def _gates_by_axis(inputs: Inputs) -> str:
    """How many gates there are, how many were kept, and how decided they are."""
    rows = []
    for axis in [axis for axis in AXIS_TITLES if axis in inputs.gates]:
        probabilities, mask = inputs.gates[axis], inputs.kept.get(axis)
        low, high = UNDECIDED
        undecided = ((probabilities > low) & (probabilities < high)).mean()
        kept = "-" if mask is None else f"{_kept_in_layers_that_stay(inputs, axis):,}"
        expected = f"{probabilities.sum():,.1f}"
        rows.append([AXIS_TITLES[axis], f"{probabilities.size:,}", expected, kept])
        rows[-1].append(f"{undecided:.1%}")
    low, high = (f"{bound:.0%}" for bound in UNDECIDED)
    header = ["gates", "number", "expected open", "kept", f"undecided ({low} to {high} open)"]
    return table(header, rows)


def _kept_in_layers_that_stay(inputs: Inputs, axis: str) -> int:
    mask, stays = inputs.kept[axis], inputs.kept.get("layer")
    if mask.ndim == 2 and stays is not None:
        mask = mask[stays.astype(bool)]
    return int(mask.sum())


def render_constraint(inputs: Inputs) -> list[str]:
    """How far the gates were from the target: when the cut was made, or at the last logged step."""
    if inputs.pruning is not None:
        constraint: Mapping[str, Mapping[str, float]] = inputs.pruning["constraint"]
        after = "after the cut"
    else:
        constraint, after = last_constraint(inputs.series), "what a cut would remove"
    if not constraint:
        return ["No axis was pruned by gates."] if inputs.pruning is not None else []
    names = ("expected_sparsity", "target_sparsity", "realised_sparsity")
    rows, distances = [], {}
    for axis, values in constraint.items():
        distances[axis] = abs(values["expected_sparsity"] - values["target_sparsity"])
        cells = [f"{values[name]:.2%}" for name in names]
        rows.append([AXIS_TITLES.get(axis, axis), *cells, f"{100 * distances[axis]:.2f} points"])
    header = ["removed", "expected by the gates", "target", after, "expected - target"]
    return [table(header, rows), _judge(distances, cut=inputs.pruning is not None)]


def _judge(distances: Mapping[str, float], *, cut: bool) -> str:
    """Whether the gates reached the target; loud if not."""
    worst = max(distances, key=distances.__getitem__)
    name = escape(AXIS_TITLES.get(worst, worst))
    distance = f"{100 * distances[worst]:.2f} points of sparsity ({name})"
    if distances[worst] <= WORST_DISTANCE:  # not so if it is a NaN
        return f"The largest distance between gates and target is {distance}."
    done, would = ("gave", "removed") if cut else ("would give", "would remove")
    return (
        f"> **WARNING: the gates never reached the target: they were {distance} away.** The cut "
        f"{done} the exact target all the same, but it {would} what the gates had not decided to "
        "remove. Train longer, or raise the learning rate of the gates and the multipliers."
    )
