"""One picture of what pruning kept and what it saves: scores, parameters, and how much faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bge_pruning.reports.score_plot import ROW_HEIGHT, count_rows, fill_scores
from bge_pruning.utils.tasks import main_scores
from bge_pruning.utils.visualization import LIGHT, Theme, dress, make_figure, text_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SCORES = 8  # rows; all of them are in the picture of the scores
HEIGHT = 3.3
PARTS = ("encoder", "embeddings", "pooler + heads")


@dataclass(frozen=True)
class Gain:
    """How many times better the pruned model is, with the quartiles if they were measured."""

    name: str
    ratio: float
    quartiles: tuple[float, float] | None = None


def draw_summary(evaluation: Mapping[str, Any], theme: Theme = LIGHT) -> Figure:
    """Draws the scores, parameters and gains of a pruned model beside its baseline.

    Args:
        evaluation: Content of ``evaluation.json``; a panel without numbers is left out.
        theme: Colours.

    Returns:
        The figure.

    Raises:
        ValueError: If the evaluation holds none of the three.
    """
    scores, gains = main_scores(evaluation), compute_gains(evaluation)
    models = count_models(evaluation["parameters"])
    shown = scores[:MAX_SCORES]
    widths = ([5.2] if shown else []) + ([2.9] if models else []) + ([3.3] if gains else [])
    if not widths:
        raise ValueError(
            "the evaluation has nothing to draw. To fix, evaluate on at least one task."
        )
    height = max(HEIGHT, 1.3 + ROW_HEIGHT * count_rows(shown))
    with theme.context():
        figure = make_figure(sum(widths), height)
        panels = iter(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False).flat)
        if shown:
            _draw_scores(next(panels), shown, len(scores), theme)
        if models:
            _draw_parameters(next(panels), models, theme)
        if gains:
            _draw_gains(next(panels), gains, evaluation.get("speed"), theme)
    return figure


def count_models(
    parameters: Mapping[str, Mapping[str, int] | None],
) -> dict[str, Mapping[str, int]]:
    """Parameters by part of the original and of the pruned model, as far as they are known."""
    models = {"original": parameters["baseline"], "pruned": parameters["model"]}
    return {name: counts for name, counts in models.items() if counts}


def compute_gains(evaluation: Mapping[str, Any]) -> list[Gain]:
    """What was measured of both models, as times better than the original."""
    gains = []
    if speed := evaluation.get("speed"):
        rate, latency = speed["throughput_texts_per_s"], speed["latency_ms"]
        slow, fast = latency["ratio_iqr"][::-1]
        gains += [
            Gain("more texts per second", rate["ratio"], tuple(rate["ratio_iqr"])),
            Gain("faster for one text", 1 / latency["ratio"], (1 / slow, 1 / fast)),
        ]
    sizes = {"smaller on disk": evaluation.get("size_bytes") or {}}
    sizes["less memory"] = {
        name: sum(used.values()) for name, used in (memory_bytes(evaluation) or {}).items()
    }
    for name, size in sizes.items():
        if size.get("model") and size.get("baseline"):
            gains.append(Gain(name, size["baseline"] / size["model"]))
    return gains


def describe_machine(speed: Mapping[str, Any]) -> str:
    """What speed was measured on."""
    threads = speed["threads"]
    return f"{speed['device']}, {threads} thread{'' if threads == 1 else 's'}"


def memory_bytes(evaluation: Mapping[str, Any]) -> dict[str, dict[str, int]] | None:
    """Bytes of weights and of activations of both models, if all were measured.

    ONNX Runtime does not tell what its activations take.
    """
    memory = (evaluation.get("speed") or {}).get("memory_bytes")
    if memory is None or any(None in memory[name].values() for name in ("baseline", "model")):
        return None
    return {name: memory[name] for name in ("baseline", "model")}


def _draw_scores(panel: Axes, shown: Sequence[Mapping[str, Any]], count: int, theme: Theme) -> None:
    fill_scores(panel, shown, theme)
    rest = f", the first {len(shown)} of {count}" if count > len(shown) else ""
    panel.set_title(f"What is left{rest}")


def _draw_parameters(panel: Axes, models: Mapping[str, Mapping[str, int]], theme: Theme) -> None:
    """Stacked bars in millions; parts too thin for a number inside go without one."""
    total = max(counts["total"] for counts in models.values())
    bottoms = [0.0] * len(models)
    for part, colour in zip(PARTS, theme.fills, strict=True):
        keys = ("pooler", "heads") if part == PARTS[-1] else (part,)
        values = [sum(counts[key] for key in keys) / 1e6 for counts in models.values()]
        drawn = panel.bar(list(models), values, 0.6, bottom=bottoms, color=colour, label=part)
        inside = [f"{value:.1f}" if value > 0.07e-6 * total else "" for value in values]
        look = {"fontsize": 8.5, "color": text_on(colour)}
        panel.bar_label(drawn, inside, label_type="center", **look)
        bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
    sums = [f"{counts['total'] / 1e6:.1f} M" for counts in models.values()]
    panel.bar_label(drawn, sums, padding=3, weight="bold")
    panel.set_ylim(0, 1.13 * total / 1e6)
    panel.set_xlim(-0.6, len(models) - 0.4)
    panel.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, columnspacing=1, handlelength=1.2
    )
    dress(panel, "Parameters (millions)")


def _draw_gains(
    panel: Axes, gains: Sequence[Gain], speed: Mapping[str, Any] | None, theme: Theme
) -> None:
    """A bar for each, with the quartiles as a whisker; 1 is the original."""
    places = range(len(gains))
    panel.barh(places, [gain.ratio for gain in gains], 0.55, color=theme.fills[0])
    for place, gain in enumerate(gains):
        if gain.quartiles:
            panel.hlines(place, *gain.quartiles, color=theme.ink, linewidth=1.6)
        reach = max((gain.ratio, *(gain.quartiles or ())))
        panel.annotate(
            f"{gain.ratio:.2f} x", (reach, place), (5, 0), textcoords="offset points", va="center"
        )
    panel.axvline(1, color=theme.muted, linewidth=1.3, linestyle=(0, (4, 2)))
    panel.set_yticks(places, [gain.name for gain in gains])
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(len(gains) - 0.4, -0.6)
    largest = max(value for gain in gains for value in (1.0, gain.ratio, *(gain.quartiles or ())))
    panel.set_xlim(0, 1.25 * largest)
    machine = f"\non {describe_machine(speed)}" if speed else ""
    # To the right: the name of a device is longer than the axis, and there is room at the left.
    panel.set_xlabel(f"times better than the original (dashed){machine}", loc="right", fontsize=8.5)
    dress(panel, "What was gained", grid="x")
