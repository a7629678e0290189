"""The tables of a report: scores, gains, gates and the constraint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bge_pruning.reports.markdown import Block, heading, paragraph, table, warning
from bge_pruning.reports.report_data import Inputs, last_constraint
from bge_pruning.reports.summary_plot import count_models, machine_of, memory_bytes
from bge_pruning.utils import records
from bge_pruning.utils.visualization import AXIS_TITLES

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
PARTS = ("encoder", "embeddings", "pooler", "heads", "total")
LABELS = 3  # columns of a score table that hold words, at its left
# A larger distance, as a share of the axis, means that the cut removed what the gates had not
# decided on.
WORST_DISTANCE = 0.01
UNDECIDED = (0.1, 0.9)
QUALITY = (
    "Scores are mteb's: Spearman correlation of a pair's similarity with its gold score, nDCG@10 "
    "of retrieval. The interval is a 95 % bootstrap over pairs or queries; p is that of a paired "
    "test against the original: a large one means that the difference may be chance. Floors "
    "are random weights of the same shape, and the words alone, without any layer: the mean of "
    "their embeddings (dense), the number of tokens in common (sparse), MaxSim of their embeddings "
    "(colbert), and the weighted sum of these as of the model's outputs. What is kept above the "
    "floor is (model - floor) / (original - floor), with the larger floor."
)


def _cells(style: str, *values: float | None, unit: str = "") -> list[str]:
    """Numbers, or ``-`` where there is none."""
    return ["-" if value is None else format(value, style) + unit for value in values]


def share(whole: float | None, part: float | None) -> str:
    """How much is kept, in percent."""
    return f"{part / whole:.1%}" if whole and part is not None else "-"


def render_bytes(size: int | None) -> str:
    """A number of bytes with three digits and a unit."""
    if size is None:
        return "-"
    unit, name = next((pair for pair in UNITS if size >= pair[0]), UNITS[-1])
    number = size / unit
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} {name}"


def count_parts(inputs: Inputs) -> dict[str, records.Parameters]:
    """Parameters of the original and of the pruned model, as far as they are known."""
    if inputs.pruning is not None:
        counts = inputs.pruning.parameters
        return {"original": counts.source, "pruned": counts.extracted}
    return {} if inputs.evaluation is None else count_models(inputs.evaluation)


def render_gains(inputs: Inputs) -> list[Block]:
    """Tables of parameters, size and speed; without heading."""
    parts = _parameters(count_parts(inputs))
    if inputs.evaluation is not None:
        parts += render_sizes(inputs.evaluation) + render_speed(inputs.evaluation.speed)
    return parts


def _parameters(counts: Mapping[str, records.Parameters]) -> list[Block]:
    if not counts:
        return []
    rows = []
    for part in PARTS:
        numbers = [getattr(model, part) for model in counts.values()]
        kept = [share(*numbers)] if len(numbers) == 2 else []
        rows.append([part, *(f"{number:,}" for number in numbers), *kept])
    return [table(["parameters", *counts, *(["kept"] if len(counts) == 2 else [])], rows)]


def render_sizes(evaluation: records.EvaluationRecord) -> list[Block]:
    """Table of the size on disk and the memory while encoding; nothing if none is known."""
    sizes = {"weights on disk": evaluation.size_bytes or {}}
    memory = memory_bytes(evaluation)
    for kind in ("weights", "activations") if memory else ():
        sizes[f"memory of {kind}"] = {name: used.get(kind) for name, used in memory.items()}
    rows = []
    for name, size in sizes.items():
        both = size.get("baseline"), size.get("model")
        if any(both):
            rows.append([name, *map(render_bytes, both), share(*both)])
    parts = [table(["size", "original", "pruned", "kept"], rows)] if rows else []
    if rows and memory:
        at = evaluation.speed.memory_bytes
        texts = f"{at.texts:,} texts of up to {at.tokens:,} tokens"
        note = f"Activations are the most that other tensors take while {texts} are embedded."
        parts.append(paragraph(note))
    return parts


def render_speed(speed: records.Speed | None) -> list[Block]:
    """Table of latency and throughput, and the machine that they were measured on."""
    if speed is None:
        return [paragraph("Speed: not measured.")]
    latency, rate = speed.latency_ms, speed.throughput_texts_per_s
    both = latency.baseline, latency.model
    medians = _cells(".1f", *(times and times.median for times in both), unit=" ms")
    slowest = _cells(".1f", *(times and times.p95 for times in both), unit=" ms")
    rates = _cells(".0f", rate.baseline, rate.model, unit=" texts/s")
    rows = [
        ["one text, median", *medians, _ratio(latency)],
        ["one text, 95th percentile", *slowest, "-"],
        [f"batches of {speed.batch_size}, sorted by length", *rates, _ratio(rate)],
    ]
    measured = f"Measured in turns in one process on {machine_of(speed)}"
    note = f"{measured}; in brackets the quartiles of the ratio."
    return [table(["speed", "original", "pruned", "pruned / original"], rows), paragraph(note)]


def _ratio(figures: records.Latency | records.Throughput) -> str:
    if figures.ratio_iqr is None:
        return f"{figures.ratio:.2f}"
    low, high = figures.ratio_iqr
    return f"{figures.ratio:.2f} ({low:.2f} to {high:.2f})"


def render_pruned(inputs: Inputs) -> list[Block]:
    """Shapes, layers and gates by axis; without heading and pictures."""
    parts = []
    if (pruning := inputs.pruning) is not None:
        before, after = pruning.source_shape.as_dict(), pruning.shape.as_dict()
        rows = [[key, before.get(key, "-"), after[key]] for key in after]
        layers = render_layers(pruning.kept.layer, pruning.source_shape.num_hidden_layers)
        parts += [table(["shape", "original", "pruned"], rows), *layers]
    if inputs.gates:
        parts.append(_gates_by_axis(inputs))
    return parts


def render_layers(kept: Sequence[int] | None, count: int) -> list[Block]:
    """Which layers, counted from 0, stay and which are removed; ``None`` keeps all."""
    if kept is None or len(kept) == count:
        return []
    gone = ", ".join(str(layer) for layer in range(count) if layer not in kept)
    stays = ", ".join(map(str, kept))
    return [paragraph(f"Layers that stay, counted from 0: {stays}. Removed: {gone}.")]


def _gates_by_axis(inputs: Inputs) -> Block:
    low, high = UNDECIDED
    rows = []
    for axis in [axis for axis in AXIS_TITLES if axis in inputs.gates]:
        probabilities = inputs.gates[axis]
        undecided = ((probabilities > low) & (probabilities < high)).mean()
        kept = f"{_kept_in_layers_that_stay(inputs, axis):,}" if axis in inputs.kept else "-"
        numbers = [f"{probabilities.size:,}", f"{probabilities.sum():,.1f}", kept]
        rows.append([AXIS_TITLES[axis], *numbers, f"{undecided:.1%}"])
    undecided = f"undecided ({low:.0%} to {high:.0%} open)"
    return table(["gates", "number", "expected open", "kept", undecided], rows)


def _kept_in_layers_that_stay(inputs: Inputs, axis: str) -> int:
    mask, stays = inputs.kept[axis], inputs.kept.get("layer")
    if mask.ndim == 2 and stays is not None:
        mask = mask[stays.astype(bool)]
    return int(mask.sum())


def render_by_layer(inputs: Inputs) -> list[Block]:
    """A table with a row for each layer; nothing without gates of layers, heads or units."""
    axes = [axis for axis in ("head", "intermediate") if axis in inputs.gates]
    layers = inputs.gates.get("layer")
    if not axes and layers is None:
        return []
    header = ["layer"]
    header += [] if layers is None else ["stays", "probability that it is open"]
    for axis in axes:
        header += [f"{AXIS_TITLES[axis]}, expected open", "kept"]
    stays = inputs.kept.get("layer")
    rows = []
    for layer in range(len(inputs.gates[axes[0]] if axes else layers)):
        gone = stays is not None and not stays[layer]
        cells: list[object] = [layer]
        if layers is not None:
            cells += ["-" if stays is None else "no" if gone else "yes", f"{layers[layer]:.3f}"]
        for axis in axes:
            mask = inputs.kept.get(axis)
            kept = "-" if mask is None or gone else f"{int(mask[layer].sum()):,}"
            cells += [f"{inputs.gates[axis][layer].sum():,.1f}", kept]
        rows.append(cells)
    return [heading("Layer by layer"), table(header, rows)]


def render_constraint(inputs: Inputs) -> list[Block]:
    """How far the gates were from the target: when the cut was made, or at the last logged step."""
    cut = inputs.pruning is not None
    constraint = inputs.pruning.constraint if cut else last_constraint(inputs.series)
    if not constraint:
        return [paragraph("No axis was pruned by gates.")] if cut else []
    rows, distances = [], {}
    for axis, found in constraint.items():
        distances[axis] = abs(found.expected_sparsity - found.target_sparsity)
        shares = (found.expected_sparsity, found.target_sparsity, found.realised_sparsity)
        points = f"{100 * distances[axis]:.2f} points"
        rows.append([AXIS_TITLES.get(axis, axis), *(f"{value:.2%}" for value in shares), points])
    after = "after the cut" if cut else "what a cut would remove"
    header = ["removed", "expected by the gates", "target", after, "expected - target"]
    return [table(header, rows), _judge(distances, cut=cut)]


def _judge(distances: Mapping[str, float], *, cut: bool) -> Block:
    """Whether the gates reached the target; loud if not."""
    worst = max(distances, key=distances.__getitem__)
    name = AXIS_TITLES.get(worst, worst)
    distance = f"{100 * distances[worst]:.2f} points of sparsity ({name})"
    if distances[worst] <= WORST_DISTANCE:
        return paragraph(f"The largest distance between gates and target is {distance}.")
    done, would = ("gave", "removed") if cut else ("would give", "would remove")
    return warning(
        f"WARNING: the gates never reached the target: they were {distance} away.",
        f"The cut {done} the exact target all the same, but it {would} what the gates had not "
        "decided to remove. Train longer, or raise the learning rate of the gates and the "
        "multipliers.",
    )


def score_header(evaluation: records.EvaluationRecord) -> list[str]:
    """Names of the cells of :func:`score_rows`."""
    models = ["original", *_others(evaluation), "model"]
    floors = ["random weights", "words alone"]
    kept = ["kept", "kept above floor", "p"]
    return ["task", "mode", "metric", *models, "95 % interval", *floors, *kept]


def score_rows(evaluation: records.EvaluationRecord) -> list[list[str]]:
    """A row for each task and mode; a score without an interval is a ``KeyError``."""
    return _rows(evaluation, evaluation.main_scores())


def mean_rows(evaluation: records.EvaluationRecord) -> list[list[str]]:
    """The same for the means over tasks."""
    return _rows(evaluation, evaluation.means)


def _rows(evaluation: records.EvaluationRecord, scores: Sequence[records.Entry]) -> list[list[str]]:
    names = _others(evaluation)
    return [_row(entry, names) for entry in scores]


def _others(evaluation: records.EvaluationRecord) -> list[str]:
    return list(dict.fromkeys(name for entry in evaluation.tasks for name in entry.also))


def _row(entry: records.Entry, names: Sequence[str]) -> list[str]:
    if entry.interval is None:
        raise KeyError("interval")
    low, high = entry.interval
    others = (entry.also.get(name) for name in names)
    scores = _cells(".4f", entry.baseline, *others, entry.value)
    floors = _cells(".4f", *map(entry.floors.get, ("random_weights", "word_embeddings")))
    kept = _cells(".1%", entry.retention, entry.retention_above_floor)
    interval, p_value = f"{low:.3f} to {high:.3f}", _cells(".3f", entry.p_value)
    if entry.p_value is not None and entry.p_value < 0.001:  # it is never 0
        p_value = ["< 0.001"]
    return [*_labels(entry), *scores, interval, *floors, *kept, *p_value]


def _labels(entry: records.Entry) -> list[str]:
    return [entry.task, entry.mode, records.METRIC_TITLES.get(entry.metric, "-")]


def evaluation_notes(evaluation: records.EvaluationRecord) -> list[str]:
    """What else to know of scores: texts that were truncated, and layers in bfloat16."""
    counts = {entry.task: (entry.truncated, entry.texts or 0) for entry in evaluation.tasks}
    cuts = [
        f"{task}: {cut:,} of {texts:,} texts are longer than the limit of tokens and were cut."
        for task, (cut, texts) in counts.items()
        if cut
    ]
    half = evaluation.precision == "bf16"
    return [*cuts, *["Layers of all models, also for speed, were in bfloat16."] * half]


def render_scores(evaluation: records.EvaluationRecord) -> list[str]:
    """Heading, explanation and tables, an entry each; nothing if nothing was scored."""
    parts = render_main_scores(evaluation)
    return [*parts, *_render_other_metrics(evaluation)] if parts else []


def render_main_scores(evaluation: records.EvaluationRecord) -> list[str]:
    """Like :func:`render_scores`, but without the further metrics that mteb computed."""
    rows = score_rows(evaluation)
    if not rows:
        return []
    header, means = score_header(evaluation), mean_rows(evaluation)
    # First what most people look for; a test of means is not made.
    tables = [table(header[:-1], [row[:-1] for row in means], LABELS)] if means else []
    tables.append(table(header, rows, LABELS))
    notes = map(paragraph, evaluation_notes(evaluation))
    return ["## Quality", paragraph(QUALITY), *tables, *notes]


def _render_other_metrics(evaluation: records.EvaluationRecord) -> list[Block]:
    rows = []
    for entry in evaluation.tasks:
        if not entry.main:
            scores = _cells(".4f", entry.baseline, entry.value, entry.floor)
            rows.append([*_labels(entry), *scores, *_cells(".1%", entry.retention)])
    header = ["task", "mode", "metric", "original", "model", "floor", "kept"]
    return [table(header, rows, LABELS)] if rows else []
