"""The sections of a report: sentences, tables and pictures, in the order in which people ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median

from bge_pruning.reports.markdown import Block, fence, paragraph, table
from bge_pruning.reports.report_data import Inputs, Series, logged_scores, task_losses
from bge_pruning.reports.report_tables import (
    count_parts,
    render_by_layer,
    render_bytes,
    render_constraint,
    render_gains,
    render_pruned,
    render_scores,
    share,
)
from bge_pruning.reports.summary_plot import memory_bytes
from bge_pruning.utils.records import Entry

MAX_SENTENCES = 3  # more scores are summed up
ENDS = 25  # the start and the end of a run are its first and its last 1/25


def build_sections(inputs: Inputs, pictures: Mapping[str, Block]) -> dict[str, list[Block]]:
    """Blocks by heading; sections without any are left out."""

    def show(*names: str) -> list[Block]:
        return [pictures[name] for name in names if name in pictures]

    scores = [] if inputs.evaluation is None else render_scores(inputs.evaluation)[1:]
    gates = [*render_pruned(inputs), *show("gates.png"), *render_by_layer(inputs)]
    constraint = [*render_constraint(inputs), *show("constraint.png", "multipliers.png")]
    sections = {
        "Quality": [*show("scores.png"), *scores] if scores else [],
        "What was gained": render_gains(inputs),
        "What was pruned": gates,
        "How the constraint was met": constraint,
        "Training": [*_curves(inputs.series), *show("training.png")],
        "Recovery": [*_curves(inputs.recovery), *show("recovery.png")],
        "How to reproduce": _reproduction(inputs),
        "Configuration": [fence(inputs.config_text, "yaml")] if inputs.config_text else [],
    }
    return {heading: blocks for heading, blocks in sections.items() if blocks}


def title_of(inputs: Inputs) -> str:
    """The heading of the report."""
    if inputs.pruning is not None:
        return f"Pruned {Path(inputs.pruning.source.base_model).name}"
    if inputs.evaluation is not None:
        return f"Evaluation of {Path(inputs.evaluation.model or inputs.name).name}"
    return f"Training run {inputs.name}"


def summarise_run(inputs: Inputs) -> str:
    """The result in a paragraph."""
    counts = count_parts(inputs)
    sentences = []
    if len(counts) == 2:
        whole, left = counts["original"], counts["pruned"]
        sentences.append(
            f"The pruned model has {left.total / 1e6:.1f} million parameters, "
            f"{left.total / whole.total:.1%} of the original's {whole.total / 1e6:.1f} million; "
            f"of the encoder it keeps {left.encoder / whole.encoder:.1%}."
        )
    if inputs.evaluation is not None:
        means, scores = inputs.evaluation.means, inputs.evaluation.main_scores()
        sentences += _mean_sentences(means) or _score_sentences(scores)
        if speed := inputs.evaluation.speed:
            ratio, device = speed.throughput_texts_per_s.ratio, speed.device or "its machine"
            sentences.append(f"It encodes {ratio:.2f} times as many texts a second on {device}.")
    elif inputs.pruning is None:
        sentences.append(_run_sentence(inputs))
    return " ".join(sentences)


def _run_sentence(inputs: Inputs) -> str:
    batches = max((batches[-1] for batches, _ in inputs.series.values()), default=0)
    model = inputs.config.model
    start = f" from {model.base_model}" if model and model.base_model else ""
    kind = "pruning" if inputs.gates else "training without gates"
    return f"After {batches:,} steps of {kind}{start}: what is known from training alone."


def _mean_sentences(means: Sequence[Entry]) -> list[str]:
    """A sentence for each kind of tasks; none where there is no original."""
    sentences = []
    for task, group in groupby(means, key=lambda entry: entry.task):
        kept = [f"{e.mode} {e.retention:.1%}" for e in group if e.retention is not None]
        if kept:
            sentences.append(f"Of the original's {task} it keeps: {', '.join(kept)}.")
    return sentences


def _score_sentences(scores: Sequence[Entry]) -> list[str]:
    """A sentence for each score, or where there are many the median and the extremes."""
    kept = {_name(entry): entry.retention for entry in scores if entry.retention is not None}
    if len(scores) <= MAX_SENTENCES or not kept:
        return [_score_sentence(entry) for entry in scores[:MAX_SENTENCES]]
    worst, best = min(kept, key=kept.__getitem__), max(kept, key=kept.__getitem__)
    return [
        f"Over {len(kept)} scores the median keeps {median(kept.values()):.1%} of the original's, "
        f"the worst {kept[worst]:.1%} ({worst}), the best {kept[best]:.1%} ({best})."
    ]


def _name(entry: Entry) -> str:
    return entry.task if entry.mode == "dense" else f"{entry.task}, {entry.mode}"


def _score_sentence(entry: Entry) -> str:
    said = f"On {_name(entry)} it scores {entry.value:.4f}"
    if entry.retention is None or entry.baseline is None:
        return f"{said} (floor {entry.floor:.4f})."
    kept = f"{said} against {entry.baseline:.4f}: {entry.retention:.1%} is kept"
    if entry.retention_above_floor is None:
        return f"{kept}."
    above = entry.retention_above_floor
    return f"{kept}, and {above:.1%} of what lies above the floor of {entry.floor:.4f}."


def glance(inputs: Inputs) -> list[Block]:
    """The figures that people look for first, as a table of two columns."""
    rows = []
    counts, evaluation = count_parts(inputs), inputs.evaluation
    scores = [] if evaluation is None else evaluation.main_scores()
    means = [] if evaluation is None else evaluation.means
    rows += [[f"kept, {e.task}, {e.mode}", f"{e.retention:.1%}"] for e in means if e.retention]
    if kept := [] if rows else [entry.retention for entry in scores if entry.retention is not None]:
        name = "score kept" if len(kept) == 1 else f"score kept, median of {len(kept)}"
        rows.append([name, f"{median(kept):.1%}"])
    if len(counts) == 2:
        whole, left = counts["original"], counts["pruned"]
        rows.append(["encoder parameters kept", share(whole.encoder, left.encoder)])
        rows.append(["all parameters kept", share(whole.total, left.total)])
    if evaluation is not None:
        size = evaluation.size_bytes or {}
        if size.get("baseline") and size.get("model"):
            rows.append(["size on disk", render_bytes(size["model"])])
        if speed := evaluation.speed:
            rows.append(["throughput", f"{speed.throughput_texts_per_s.ratio:.2f} x"])
            rows.append(["latency of one text", f"{speed.latency_ms.ratio:.2f} x"])
        if memory := memory_bytes(evaluation):
            rows.append(["memory in use", render_bytes(sum(memory["model"].values()))])
    return [table(["at a glance", "pruned"], rows)] if rows else []


def _curves(series: Series) -> list[Block]:
    losses = []
    for key in task_losses(series):
        values = series[key][1]
        reach = max(1, len(values) // ENDS)
        name = key.removeprefix("loss/train/").replace("_", " ")
        losses.append([name, *(f"{median(end):.4g}" for end in (values[:reach], values[-reach:]))])
    scores = []
    for name, key in logged_scores(series).items():
        values = series[key][1]
        scores.append([name, *(f"{v:.4f}" for v in (values[0], max(values), values[-1]))])
    ends, best = ["at the start", "at the end"], ["first", "best", "last"]
    parts = [table(["task loss (medians)", *ends], losses)] if losses else []
    return parts + ([table(["score while training", *best], scores)] if scores else [])


def _reproduction(inputs: Inputs) -> list[Block]:
    evaluation, pruning = inputs.evaluation, inputs.pruning
    parts = [fence("\n".join(inputs.commands), "bash")] if inputs.commands else []
    recorded = pruning is not None and "seed" in pruning.model_fields_set
    seeds = {"the run": pruning.seed if recorded else inputs.config.seed}
    versions = {"run": (pruning.versions if pruning is not None else {}) or inputs.versions}
    if evaluation is not None:
        seeds["the evaluation"] = evaluation.seed
        versions["evaluation"] = evaluation.versions
    said = [f"of {name} {seed}" for name, seed in seeds.items() if seed is not None]
    if said:
        parts.append(paragraph(f"Seed {', '.join(said)}."))
    known = {name: found for name, found in versions.items() if found}
    if known:
        packages = dict.fromkeys(package for found in known.values() for package in found)
        rows = [[package, *(f.get(package, "-") for f in known.values())] for package in packages]
        parts.append(table(["version", *(f"of the {name}" for name in known)], rows))
    return parts
