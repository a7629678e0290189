"""The tables of a report: scores, gains, gates and the constraint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bge_pruning.reports.markdown import escape, table
from bge_pruning.reports.report_data import Inputs, last_constraint
from bge_pruning.reports.summary_plot import count_models, describe_machine, memory_bytes
from bge_pruning.utils.tasks import METRIC_TITLES, main_scores
from bge_pruning.utils.visualization import AXIS_TITLES

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def count_parts(inputs: Inputs) -> dict[str, Mapping[str, int]]:
    """Parameters by part of the original and of the pruned model, as far as they are known."""
    if inputs.pruning is not None:
        counts = inputs.pruning["parameters"]
        return {"original": counts["source"], "pruned": counts["extracted"]}
    return {} if inputs.evaluation is None else count_models(inputs.evaluation["parameters"])


def render_gains(inputs: Inputs) -> list[str]:
    """Tables of parameters, size and speed; without heading."""
    evaluation = inputs.evaluation
    parts = _parameters(count_parts(inputs))
    if evaluation is not None:
        parts += render_sizes(evaluation) + render_speed(evaluation.get("speed"))
    return parts


def _parameters(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    if not counts:
        return []
    rows = []
    for part in ("encoder", "embeddings", "pooler", "heads", "total"):
        numbers = [counts[name][part] for name in counts]
        kept = [share(*numbers)] if len(numbers) == 2 else []
        rows.append([part, *(f"{number:,}" for number in numbers), *kept])
    return [table(["parameters", *counts, *(["kept"] if len(counts) == 2 else [])], rows)]


def share(whole: float | None, part: float | None) -> str:
    """How much is kept, in percent."""
    return f"{part / whole:.1%}" if whole and part is not None else "-"


def render_sizes(evaluation: Mapping[str, Any]) -> list[str]:
    """Table of the size on disk and the memory while encoding; nothing if none is known.

    Args:
        evaluation: What :func:`bge_pruning.evaluation.evaluate.evaluate` returns.
    """
    sizes = {"weights on disk": evaluation.get("size_bytes") or {}}
    memory = memory_bytes(evaluation)
    for kind in ("weights", "activations") if memory else ():
        sizes[f"memory of {kind}"] = {name: used[kind] for name, used in memory.items()}
    rows = []
    for name, size in sizes.items():
        both = size.get("baseline"), size.get("model")
        if any(both):
            rows.append([name, *map(render_bytes, both), share(*both)])
    if not rows:
        return []
    parts = [table(["size", "original", "pruned", "kept"], rows)]
    if memory:
        at = evaluation["speed"]["memory_bytes"]
        parts.append(
            f"Activations are the most that other tensors take while {at['texts']:,} texts of up "
            f"to {at['tokens']:,} tokens are embedded."
        )
    return parts


def render_bytes(size: int | None) -> str:
    """A number of bytes as people read it, three digits of it."""
    if size is None:
        return "-"
    unit, name = next((pair for pair in UNITS if size >= pair[0]), UNITS[-1])
    number = size / unit
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} {name}"


def render_speed(speed: Mapping[str, Any] | None) -> list[str]:
    """Table of latency and throughput, and what they were measured on.

    Args:
        speed: See :func:`bge_pruning.utils.model_analysis.measure_speed`.
    """
    if not speed:
        return ["Speed: not measured."]
    latency, rate = speed["latency_ms"], speed["throughput_texts_per_s"]
    rows = []
    for name, key in (("median", "median"), ("95th percentile", "p95")):
        cells = [f"{latency[which][key]:.1f} ms" for which in ("baseline", "model")]
        ratio = f"{latency['ratio']:.2f} {_quartiles(latency)}" if key == "median" else "-"
        rows.append([f"one text, {name}", *cells, ratio])
    cells = [f"{rate[which]:.0f} texts/s" for which in ("baseline", "model")]
    many = f"batches of {speed.get('batch_size', 32)}, sorted by length"
    rows.append([many, *cells, f"{rate['ratio']:.2f} {_quartiles(rate)}"])
    return [
        table(["speed", "original", "pruned", "pruned / original"], rows),
        f"Measured in turns in one process on {escape(describe_machine(speed))}; in brackets the "
        "quartiles of the ratio.",
    ]


def _quartiles(figures: Mapping[str, Any]) -> str:
    low, high = figures["ratio_iqr"]
    return f"({low:.2f} to {high:.2f})"


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


LABELS = 3  # columns at the left that hold words


def score_header(evaluation: Mapping[str, Any]) -> list[str]:
    """Names of the cells of :func:`score_rows`.

    Args:
        evaluation: What :func:`bge_pruning.evaluation.evaluate.evaluate` returns.
    """
    return [
        *("task", "mode", "metric", "original", *_others(evaluation), "model", "95 % interval"),
        *("random weights", "word embeddings", "kept", "kept above floor", "p"),
    ]


def score_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """A row for each task and mode, as :func:`score_header` names its cells.

    Args:
        evaluation: As there.
    """
    names = _others(evaluation)
    return [_row(entry, names) for entry in main_scores(evaluation)]


def _others(evaluation: Mapping[str, Any]) -> list[str]:
    """Further models that were scored."""
    return list(dict.fromkeys(n for entry in evaluation["tasks"] for n in entry.get("also", {})))


def _row(entry: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    low, high = entry["interval"]
    floors = entry["floors"]
    scores = [
        entry["baseline"],
        *(entry.get("also", {}).get(name) for name in names),
        entry["value"],
    ]
    return [
        *(entry["task"], entry["mode"], METRIC_TITLES[entry["metric"]]),
        *(_cell(score, ".4f") for score in scores),
        f"{low:.3f} to {high:.3f}",
        *(_cell(floors.get(name), ".4f") for name in ("random_weights", "word_embeddings")),
        *(_cell(entry[name], ".1%") for name in ("retention", "retention_above_floor")),
        _cell(entry.get("p_value"), ".3f"),
    ]


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def truncation_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """A sentence for each task whose texts were cut.

    Args:
        evaluation: As in :func:`score_rows`.
    """
    counts = {entry["task"]: (entry["truncated"], entry["texts"]) for entry in evaluation["tasks"]}
    return [
        f"{task}: {cut:,} of {texts:,} texts are longer than the limit of tokens and were cut."
        for task, (cut, texts) in counts.items()
        if cut
    ]


def render_scores(evaluation: Mapping[str, Any]) -> list[str]:
    """Heading, explanation and Markdown tables, an entry each; nothing if nothing was scored.

    Args:
        evaluation: As in :func:`score_rows`.
    """
    parts = render_main_scores(evaluation)
    return [*parts, *_render_other_metrics(evaluation)] if parts else []


def render_main_scores(evaluation: Mapping[str, Any]) -> list[str]:
    """As :func:`render_scores`, without what else mteb computed.

    Args:
        evaluation: As there.
    """
    rows = score_rows(evaluation)
    if not rows:
        return []
    return [
        "## Quality",
        "Scores are mteb's: Spearman correlation of a pair's similarity with its gold score, "
        "nDCG@10 of retrieval. The interval is a 95 % bootstrap over pairs or queries; p is that "
        "of a paired test against the original: a large one means that the difference may be "
        "chance. Random weights of the same shape and, for dense vectors, the mean of the word "
        "embeddings without any encoder are floors. What is kept above the floor is (model - "
        "floor) / (original - floor), with the larger floor.",
        table(score_header(evaluation), rows, LABELS),
        *(escape(note) for note in truncation_notes(evaluation)),
    ]


def _render_other_metrics(evaluation: Mapping[str, Any]) -> list[str]:
    """What else mteb computed."""
    rows = [
        [
            *(entry["task"], entry["mode"], METRIC_TITLES[entry["metric"]]),
            *(_cell(entry[name], ".4f") for name in ("baseline", "value", "floor")),
            _cell(entry["retention"], ".1%"),
        ]
        for entry in evaluation["tasks"]
        if not entry["main"]
    ]
    header = ["task", "mode", "metric", "original", "model", "floor", "kept"]
    return [table(header, rows, LABELS)] if rows else []
