"""One picture of what pruning kept and what it saves: scores, parameters, and how much faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from bge_pruning.reports.score_plot import ROW_HEIGHT, count_rows, fill_scores
from bge_pruning.utils.records import BothParameters, EvaluationRecord, Parameters, Speed
from bge_pruning.utils.visualization import LIGHT, Theme, dress, make_figure, text_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SCORES = 8  # rows; all of them are in the picture of the scores, here rather their means
HEIGHT = 3.3
WIDTH = 40  # letters of a line about the machine: more would reach into the panel at the left
PARTS = ("encoder", "embeddings", "pooler + heads")


@dataclass(frozen=True)
class Gain:
    """How many times better the pruned model is, with two quartiles if they were measured."""

    name: str
    ratio: float
    quartiles: tuple[float, ...] = ()


def draw_summary(evaluation: EvaluationRecord, theme: Theme = LIGHT) -> Figure:
    """Draw the scores, parameters and gains of a pruned model beside its baseline.

    A panel without numbers is left out.
    """
    scores, gains = evaluation.main_scores(), compute_gains(evaluation)
    if scores[MAX_SCORES:]:
        scores = evaluation.means or scores
    models, shown = count_models(evaluation), scores[:MAX_SCORES]
    widths = ([5.2] if shown else []) + ([2.9] if models else []) + ([3.3] if gains else [])
    height = max(HEIGHT, 1.3 + ROW_HEIGHT * count_rows(shown))
    with theme.context():
        figure = make_figure(sum(widths), height)
        panels = iter(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False).flat)
        if shown:
            fill_scores(panel := next(panels), shown, theme)
            rest = f", the first {MAX_SCORES} of {len(scores)}" if scores[MAX_SCORES:] else ""
            panel.set_title(f"What is left{rest}")
        if models:
            _draw_parameters(next(panels), models, theme)
        if gains:
            _draw_gains(next(panels), gains, evaluation.speed, theme)
    return figure


def can_summarise(evaluation: EvaluationRecord) -> bool:
    """Whether :func:`draw_summary` has something to draw."""
    return bool(evaluation.main_scores() or count_models(evaluation) or compute_gains(evaluation))


def count_models(evaluation: EvaluationRecord) -> dict[str, Parameters]:
    """Parameters of the original and of the pruned model, as far as they are known."""
    counts = evaluation.parameters or BothParameters()
    models = {"original": counts.baseline, "pruned": counts.model}
    return {name: parameters for name, parameters in models.items() if parameters is not None}


def compute_gains(evaluation: EvaluationRecord) -> list[Gain]:
    """What was measured of both models, as times better than the original."""
    gains = []
    if speed := evaluation.speed:
        rate, latency = speed.throughput_texts_per_s, speed.latency_ms
        fast = [1 / ratio for ratio in reversed(latency.ratio_iqr or ())]
        gains += [
            Gain("more texts per second", rate.ratio, tuple(rate.ratio_iqr or ())),
            Gain("faster for one text", 1 / latency.ratio, tuple(fast)),
        ]
    sizes = {"smaller on disk": evaluation.size_bytes or {}}
    memory = memory_bytes(evaluation) or {}
    sizes["less memory"] = {name: sum(used.values()) for name, used in memory.items()}
    for name, size in sizes.items():
        if size.get("model") and size.get("baseline"):
            gains.append(Gain(name, size["baseline"] / size["model"]))
    return gains


def machine_of(speed: Speed) -> str:
    """The machine that a speed was measured on."""
    threads = "" if speed.threads is None else f", {speed.threads} thread"
    plural = "" if speed.threads in (None, 1) else "s"
    load = f", while {speed.load}" if speed.load else ""
    return f"{speed.device or 'an unknown device'}{threads}{plural}{load}"


def memory_bytes(evaluation: EvaluationRecord) -> dict[str, dict[str, int]] | None:
    """Bytes of weights and of activations of both models, if all were measured.

    ONNX Runtime does not report the size of its activations.
    """
    memory = evaluation.speed and evaluation.speed.memory_bytes
    if memory is None or None in (*memory.baseline.values(), *memory.model.values()):
        return None
    return {"baseline": memory.baseline, "model": memory.model}


def _draw_parameters(panel: Axes, models: Mapping[str, Parameters], theme: Theme) -> None:
    """Draw stacked bars in millions; a part that is too thin for its number has none."""
    total = max(counts.total for counts in models.values())
    bottoms = [0.0] * len(models)
    for part, colour in zip(PARTS, theme.fills, strict=True):
        keys = ("pooler", "heads") if part == PARTS[-1] else (part,)
        values = [sum(getattr(counts, key) for key in keys) / 1e6 for counts in models.values()]
        drawn = panel.bar(list(models), values, 0.6, bottom=bottoms, color=colour, label=part)
        inside = [f"{value:.1f}" if value > 0.07e-6 * total else "" for value in values]
        look = {"fontsize": 8.5, "color": text_on(colour)}
        panel.bar_label(drawn, inside, label_type="center", **look)
        bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
    sums = [f"{counts.total / 1e6:.1f} M" for counts in models.values()]
    panel.bar_label(drawn, sums, padding=3, weight="bold")
    panel.set_ylim(0, 1.13 * total / 1e6)
    panel.set_xlim(-0.6, len(models) - 0.4)
    look = {"ncols": 2, "columnspacing": 1, "handlelength": 1.2}
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), **look)
    dress(panel, "Parameters (millions)")


def _draw_gains(panel: Axes, gains: Sequence[Gain], speed: Speed | None, theme: Theme) -> None:
    """Draw a bar for each gain, with the quartiles as a whisker; 1 is the original."""
    places = range(len(gains))
    panel.barh(places, [gain.ratio for gain in gains], 0.55, color=theme.fills[0])
    for place, gain in enumerate(gains):
        if gain.quartiles:
            panel.hlines(place, *gain.quartiles, color=theme.ink, linewidth=1.6)
        reach = max((gain.ratio, *gain.quartiles))
        look = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        panel.annotate(f"{gain.ratio:.2f} x", (reach, place), **look)
    panel.axvline(1, color=theme.muted, linewidth=1.3, linestyle=(0, (4, 2)))
    panel.set_yticks(places, [gain.name for gain in gains])
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(len(gains) - 0.4, -0.6)
    largest = max(value for gain in gains for value in (1.0, gain.ratio, *gain.quartiles))
    panel.set_xlim(0, 1.25 * largest)
    machine = "\n" + fill(f"on {machine_of(speed)}", WIDTH) if speed else ""
    # To the right: the name of a device is longer than the axis, and there is room at the left.
    panel.set_xlabel(f"times better than the original (dashed){machine}", loc="right", fontsize=8.5)
    dress(panel, "What was gained", grid="x")
