"""One picture of what pruning kept and what it saves: scores, parameters, speed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_pruning.utils.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    dress,
    make_figure,
    save_figure,
)
from bge_pruning.utils.tasks import main_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_summary(evaluation: Mapping[str, Any], path: str | Path) -> None:
    """Draws scores, parameters and speed of a pruned model beside its baseline.

    Args:
        evaluation: What ``bge_pruning.utils.evaluation.evaluate`` returns; without speed that panel
            is left out.
        path: Image file; the folder is made.

    Raises:
        ValueError: If the evaluation has no task.
    """
    tasks = main_scores(evaluation)
    if not tasks:
        raise ValueError(
            "the evaluation has no task to draw. To fix, evaluate on at least one STS file."
        )
    bars = len(_score_series(tasks))
    scores_width = max(3.9, len(tasks) * (0.4 * bars + 0.35))
    widths = [scores_width, 3.6, *([3.4] if evaluation.get("speed") else [])]
    figure = make_figure(sum(widths) + 0.6, 3.7)
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_quality(panels[0], tasks)
    _draw_parameters(panels[1], evaluation["parameters"])
    if evaluation.get("speed"):
        _draw_speed(panels[2], evaluation["speed"])
    save_figure(figure, path)


def _score_series(tasks: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[float], str]]:
    """Name, values over the tasks and colour of each bar of a group.

    A list: another model may have the name of one of the two. Further models share the colours.
    """
    series = []
    if tasks[0]["baseline"] is not None:
        series.append(("original", [task["baseline"] for task in tasks], GREY))
    colours = itertools.cycle((ORANGE, PURPLE, GREEN))
    for name in tasks[0].get("also", {}):
        series.append((name, [task["also"][name] for task in tasks], next(colours)))
    series.append(("pruned", [task["value"] for task in tasks], BLUE))
    return series


def _draw_quality(panel: Axes, tasks: Sequence[Mapping[str, Any]]) -> None:
    """A group of bars for each task, and the floor as a line across the group."""
    series = _score_series(tasks)
    width = min(0.3, 0.84 / len(series))
    for index, (name, values, colour) in enumerate(series):
        places = [task + (index - (len(series) - 1) / 2) * width for task in range(len(tasks))]
        drawn = panel.bar(places, values, 0.9 * width, color=colour, label=name)
        panel.bar_label(drawn, fmt="%.3f", fontsize=8, padding=2)
    floors = [task["floor"] for task in tasks]
    reach = len(series) * width / 2 + 0.03
    edges = [[task + side for task in range(len(tasks))] for side in (-reach, reach)]
    panel.hlines(floors, *edges, color="black", linewidth=1.3, linestyle=(0, (4, 2)), label="floor")
    panel.set_xticks(range(len(tasks)), [_task_label(task) for task in tasks], fontsize=8)
    panel.set_xlim(-0.55, len(tasks) - 0.45)
    everything = [0.0, *floors, *(value for _, values, _ in series for value in values)]
    span = max(everything) - min(everything)
    panel.set_ylim(min(everything), max(everything) + 0.13 * span)
    handles, labels = panel.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: labels[index] == "floor")
    panel.legend(
        *([part[i] for i in order] for part in (handles, labels)), **_below(ncols=len(labels))
    )
    dress(panel, "Quality: cosine Spearman")


def _task_label(task: Mapping[str, Any]) -> str:
    kept = "" if task["retention"] is None else f"\n{task['retention']:.1%} kept"
    return f"{task['task']}{kept}"


def _draw_parameters(panel: Axes, parameters: Mapping[str, Mapping[str, int] | None]) -> None:
    """Stacked bars in millions; parts too thin for a number inside go without one."""
    models = {"original": parameters["baseline"], "pruned": parameters["model"]}
    models = {name: counts for name, counts in models.items() if counts}
    total = max(counts["total"] for counts in models.values())
    bottoms = dict.fromkeys(models, 0.0)
    parts = {"encoder": BLUE, "embeddings": SKY, "pooler + heads": "#BFBFBF"}
    for part, colour in parts.items():
        keys = ("pooler", "heads") if part == "pooler + heads" else (part,)
        values = [sum(counts[key] for key in keys) / 1e6 for counts in models.values()]
        drawn = panel.bar(
            list(models), values, 0.55, bottom=list(bottoms.values()), color=colour, label=part
        )
        inside = [f"{value:.1f}" if value > 0.07e-6 * total else "" for value in values]
        text = "white" if part == "encoder" else "black"
        panel.bar_label(drawn, inside, label_type="center", fontsize=8, color=text)
        bottoms = {
            name: bottom + value
            for (name, bottom), value in zip(bottoms.items(), values, strict=True)
        }
    panel.bar_label(
        drawn,
        [f"{counts['total'] / 1e6:.1f} M" for counts in models.values()],
        padding=3,
        weight="bold",
    )
    panel.set_ylim(0, 1.13 * total / 1e6)
    panel.set_xlim(-0.6, len(models) - 0.4)
    panel.legend(**_below(ncols=3))
    dress(panel, "Parameters (millions)")


def _draw_speed(panel: Axes, speed: Mapping[str, Any]) -> None:
    """How many times faster, with the quartiles as a whisker; 1 is the original."""
    latency, rate = speed["latency_ms"], speed["throughput_texts_per_s"]
    quartiles = [rate["ratio_iqr"], [1 / ratio for ratio in reversed(latency["ratio_iqr"])]]
    values = [rate["ratio"], 1 / latency["ratio"]]
    errors = [[max(0, value - low) for value, (low, _) in zip(values, quartiles, strict=True)]]
    errors += [[max(0, high - value) for value, (_, high) in zip(values, quartiles, strict=True)]]
    panel.bar(
        [0, 1], values, 0.55, yerr=errors, color=BLUE, error_kw={"linewidth": 1.2, "capsize": 3}
    )
    for place, (value, (_, high)) in enumerate(zip(values, quartiles, strict=True)):
        panel.annotate(
            f"{value:.2f} x",
            (place, max(value, high)),
            (0, 4),
            textcoords="offset points",
            ha="center",
        )
    panel.axhline(1, color=GREY, linewidth=1.3, linestyle=(0, (4, 2)))
    medians = latency["baseline"]["median"], latency["model"]["median"]
    labels = [f"batches of 32\n{rate['baseline']:.0f} to {rate['model']:.0f} texts/s"]
    labels += ["one text\n{:.1f} to {:.1f} ms".format(*medians)]
    panel.set_xticks([0, 1], labels, fontsize=8)
    panel.set_ylim(0, 1.15 * max(1.0, *values, *(high for _, high in quartiles)))
    panel.set_xlabel(
        f"on {speed['device']}, {speed['threads']} threads; line: original", fontsize=8, labelpad=8
    )
    dress(panel, "Speed (times the original)")


def _below(ncols: int) -> dict[str, Any]:
    """Where the legends of the summary go."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
    return {
        **place,
        "ncols": ncols,
        "frameon": False,
        "fontsize": 8,
        "columnspacing": 1,
        "handlelength": 1.6,
    }
