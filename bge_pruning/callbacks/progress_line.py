"""One line about a training step that a person can follow."""

from __future__ import annotations

from collections.abc import Mapping

SHORT_NAMES = {"intermediate": "units", "head": "heads", "layer": "layers"}
# Of a budget; with one constraint there is nothing to tell apart.
WHOLE = ("encoder", "operations")


def render_line(
    step: int,
    steps: int,
    metrics: Mapping[str, float],
    final_targets: Mapping[str, float],
    lr: float,
    seconds_left: float,
) -> str:
    """The line, without its time.

    Args:
        step: Steps so far.
        steps: Of the whole run.
        metrics: The newest values of all that is logged, by key.
        final_targets: Sparsity after the warm-up, by constraint; empty without gates.
        lr: Learning rate of the weights.
        seconds_left: Until the end of the run.
    """
    parts = [f"step {step}/{steps}", _losses(metrics)]
    known = {a: t for a, t in final_targets.items() if f"pruning/target_sparsity/{a}" in metrics}
    if known:
        parts.append(_sparsity(metrics, known))
    if "data/texts_per_second" in metrics:
        parts.append(f"{metrics['data/texts_per_second']:.0f} texts/s")
    sources = _collect(metrics, "data/loss/")
    if len(sources) > 1:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in sorted(sources.items()))
        parts.append(f"by source {shown}")
    parts.append(f"lr {lr:.1e}")
    if "numerics/skipped_steps" in metrics:
        parts.append(f"left out {metrics['numerics/skipped_steps']:.0f}")
    return "  ".join([*parts, f"left {render_time(seconds_left)}"])


def render_time(seconds: float) -> str:
    """A length of time in the unit that fits it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _collect(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    found = {key: value for key, value in metrics.items() if key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in found.items()}


def _losses(metrics: Mapping[str, float]) -> str:
    losses = _collect(metrics, "loss/train/")
    total = losses.pop("total")
    shown = [f"{n.removeprefix('distillation_')} {value:.3f}" for n, value in losses.items()]
    return f"loss {total:.4f}" + (f" ({', '.join(shown)})" if shown else "")


def _sparsity(metrics: Mapping[str, float], final_targets: Mapping[str, float]) -> str:
    shown = []
    for axis in final_targets:
        name = "" if axis in WHOLE else f"{SHORT_NAMES.get(axis, axis)} "
        expected, target = (
            metrics[f"pruning/{kind}_sparsity/{axis}"] for kind in ("expected", "target")
        )
        shown.append(f"{name}{expected:.3f} of {target:.3f}")
    line = f"sparsity {', '.join(shown)}"
    if len(final_targets) == 1 and f"{target:.3f}" != (last := f"{final_targets[axis]:.3f}"):
        line += f" (target {last})"
    return line
