"""The sections of a report as Markdown, in the order in which people ask."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bge_pruning.reports.markdown import escape, fence, picture, table
from bge_pruning.reports.report_data import Inputs, Series, logged_scores, task_losses
from bge_pruning.reports.report_pictures import CAPTIONS
from bge_pruning.reports.summary_plot import memory_bytes
from bge_pruning.reports.tables import (
    count_parts,
    render_by_layer,
    render_bytes,
    render_constraint,
    render_gains,
    render_pruned,
    render_scores,
    share,
)
from bge_pruning.utils.tasks import main_scores

MAX_SENTENCES = 3  # scores that the summary names one by one
ENDS = 25  # the first and the last 1/25 of a run are what its ends are judged by


def render_sections(inputs: Inputs, pictures: Collection[str]) -> list[str]:
    """The report.

    Args:
        inputs: What the folder holds.
        pictures: Names of the pictures that were drawn.

    Returns:
        Headings, paragraphs, tables and pictures, an entry each.
    """

    def show(*names: str) -> list[str]:
        return [picture(CAPTIONS[name], name) for name in names if name in pictures]

    parts = [f"# {_title(inputs)}", *_summary(inputs), *_glance(inputs), *show("summary.png")]
    if inputs.evaluation is not None:
        heading, *scores = render_scores(inputs.evaluation) or [""]
        parts += [heading, *show("scores.png"), *scores] if heading else []
    parts += _section("What was gained", render_gains(inputs))
    gates = [*render_pruned(inputs), *show("gates.png"), *render_by_layer(inputs)]
    parts += _section("What was pruned", gates)
    curves = show("constraint.png", "multipliers.png")
    parts += _section("How the constraint was met", [*render_constraint(inputs), *curves])
    parts += _section("Training", [*_curves(inputs.series), *show("training.png")])
    parts += _section("Recovery", [*_curves(inputs.recovery), *show("recovery.png")])
    parts += _section("How to reproduce", _reproduction(inputs))
    if inputs.config_text:
        parts += ["## Configuration", fence(inputs.config_text, "yaml")]
    if inputs.missing:
        parts.append(
            f"Left out, because the folder does not hold them: {', '.join(inputs.missing)}."
        )
    return parts


def _section(heading: str, content: Sequence[str]) -> list[str]:
    """Nothing if there is nothing below the heading."""
    return [f"## {heading}", *content] if content else []


def _title(inputs: Inputs) -> str:
    if inputs.pruning is not None:
        return f"Pruned {escape(Path(inputs.pruning['source']['base_model']).name)}"
    if inputs.evaluation is not None:
        return f"Evaluation of {escape(Path(inputs.evaluation['model']).name)}"
    return f"Training run {escape(inputs.name)}"


def _summary(inputs: Inputs) -> list[str]:
    """The result in a paragraph."""
    counts = count_parts(inputs)
    sentences = []
    if len(counts) == 2:
        whole, left = counts["original"], counts["pruned"]
        sentences.append(
            f"The pruned model has {_millions(left['total'])} parameters, "
            f"{left['total'] / whole['total']:.1%} of the original's {_millions(whole['total'])}; "
            f"of the encoder it keeps {left['encoder'] / whole['encoder']:.1%}."
        )
    if inputs.evaluation is not None:
        sentences += _score_sentences(main_scores(inputs.evaluation))
        if speed := inputs.evaluation.get("speed"):
            ratio = speed["throughput_texts_per_s"]["ratio"]
            sentences.append(
                f"It encodes {ratio:.2f} times as many texts a second on {escape(speed['device'])}."
            )
    elif inputs.pruning is None:
        sentences.append(_run_sentence(inputs))
    return [" ".join(sentences)] if sentences else []


def _run_sentence(inputs: Inputs) -> str:
    """What is known of a run that was not extracted yet."""
    batches = max((batches[-1] for batches, _ in inputs.series.values()), default=0)
    model = inputs.config.get("model") or {}
    start = f" from {escape(model['base_model'])}" if "base_model" in model else ""
    kind = "pruning" if inputs.gates else "training without gates"
    return f"After {batches:,} batches of {kind}{start}: what is known from training alone."


def _score_sentences(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each score, or where there are many the median and the ends of what is kept."""
    kept = {_name(entry): entry["retention"] for entry in scores if entry["retention"] is not None}
    if len(scores) <= MAX_SENTENCES or not kept:
        return [_score_sentence(entry) for entry in scores[:MAX_SENTENCES]]
    worst, best = min(kept, key=kept.__getitem__), max(kept, key=kept.__getitem__)
    return [
        f"Over {len(kept)} scores the median keeps {median(kept.values()):.1%} of the original's, "
        f"the worst {kept[worst]:.1%} ({worst}), the best {kept[best]:.1%} ({best})."
    ]


def _name(entry: Mapping[str, Any]) -> str:
    mode = "" if entry["mode"] == "dense" else f", {escape(entry['mode'])}"
    return escape(entry["task"]) + mode


def _score_sentence(entry: Mapping[str, Any]) -> str:
    name, value, floor = _name(entry), entry["value"], entry["floor"]
    if entry["retention"] is None:
        return f"On {name} it scores {value:.4f} (floor {floor:.4f})."
    above = entry["retention_above_floor"]
    rest = "" if above is None else f", and {above:.1%} of what lies above the floor of {floor:.4f}"
    return (
        f"On {name} it scores {value:.4f} against {entry['baseline']:.4f}: "
        f"{entry['retention']:.1%} is kept{rest}."
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} million"


def _glance(inputs: Inputs) -> list[str]:
    """The figures that people look for first, as a table of two columns."""
    counts, evaluation = count_parts(inputs), inputs.evaluation or {"tasks": []}
    rows = []
    kept = [e["retention"] for e in main_scores(evaluation) if e["retention"] is not None]
    if kept:
        name = "score kept" if len(kept) == 1 else f"score kept, median of {len(kept)}"
        rows.append([name, f"{median(kept):.1%}"])
    if len(counts) == 2:
        for part, name in (
            ("encoder", "encoder parameters kept"),
            ("total", "all parameters kept"),
        ):
            rows.append([name, share(counts["original"][part], counts["pruned"][part])])
    size = evaluation.get("size_bytes") or {}
    if size.get("baseline") and size.get("model"):
        rows.append(["size on disk", render_bytes(size["model"])])
    if speed := evaluation.get("speed"):
        rows.append(["throughput", f"{speed['throughput_texts_per_s']['ratio']:.2f} x"])
        rows.append(["latency of one text", f"{speed['latency_ms']['ratio']:.2f} x"])
    if memory := memory_bytes(evaluation):
        rows.append(["memory in use", render_bytes(sum(memory["model"].values()))])
    return [table(["at a glance", "pruned"], rows)] if rows else []


def _curves(series: Series) -> list[str]:
    """Where the losses and the scores began and ended."""
    parts = []
    if losses := task_losses(series):
        rows = []
        for key in losses:
            values = series[key][1]
            reach = max(1, len(values) // ENDS)
            ends = median(values[:reach]), median(values[-reach:])
            name = key.removeprefix("loss/train/").replace("_", " ")
            rows.append([name, *(f"{end:.4g}" for end in ends)])
        parts.append(table(["task loss (medians)", "at the start", "at the end"], rows))
    if scores := logged_scores(series):
        rows = [
            [name, *(f"{value:.4f}" for value in (values[0], max(values), values[-1]))]
            for name, key in scores.items()
            if (values := series[key][1])
        ]
        parts.append(table(["score while training", "first", "best", "last"], rows))
    return parts


def _reproduction(inputs: Inputs) -> list[str]:
    """Commands, seeds and versions."""
    evaluation, pruning = inputs.evaluation or {}, inputs.pruning or {}
    parts = [fence("\n".join(inputs.commands), "bash")] if inputs.commands else []
    seeds = {
        "the run": pruning.get("seed", inputs.config.get("seed")),
        "the evaluation": evaluation.get("seed"),
    }
    said = [f"of {name} {escape(seed)}" for name, seed in seeds.items() if seed is not None]
    if said:
        parts.append(f"Seed {', '.join(said)}.")
    versions = {
        "run": pruning.get("versions") or inputs.versions,
        "evaluation": evaluation["versions"] if evaluation else {},
    }
    there = {name: found for name, found in versions.items() if found}
    if there:
        packages = dict.fromkeys(package for found in there.values() for package in found)
        rows = [[package, *(f.get(package, "-") for f in there.values())] for package in packages]
        parts.append(table(["version", *(f"of the {name}" for name in there)], rows))
    return parts
