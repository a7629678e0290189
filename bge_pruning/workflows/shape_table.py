"""What a search for a shape has found, as a table and in words."""

from __future__ import annotations

from collections.abc import Sequence

from bge_pruning.models.encoder_shape import count_parameters, forward_flops
from bge_pruning.workflows.shape_search import ShapeSearch


def search_rows(search: ShapeSearch) -> tuple[list[str], list[list[str]]]:
    """A table of what was measured, the best first: its header and its cells."""
    length = search.plan.target_length
    full = count_parameters(search.source).encoder
    header = [
        *("keeps layers", "layers", "hidden", "heads", "units", "encoder"),
        *(f"speed-up at {length}", "error of cosines", "above the best", "of multi-vectors"),
    ]
    rows = []
    for index, m in enumerate(search.measured):
        s, multi, (low, high) = m.shape, m.multi_vector_error, m.above_best
        speedup = forward_flops(search.source, [length]) / forward_flops(s, [length])
        rows.append(
            [
                render_spans(m.layers),
                *(str(getattr(s, f)) for f in ("num_hidden_layers", "hidden_size")),
                *(str(getattr(s, f)) for f in ("num_attention_heads", "intermediate_size")),
                f"{count_parameters(s).encoder / full:.1%}",
                f"{speedup:.2f}",
                f"{m.cosine_error:.4f}",
                f"{low:.4f} to {high:.4f}" if index else "",
                "none" if multi is None else f"{multi:.4f}",
            ]
        )
    return header, rows


def render_spans(layers: Sequence[int]) -> str:
    """Ascending numbers with runs shortened, such as ``0, 2-5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def summarise(search: ShapeSearch) -> str:
    """What was measured, which shapes are as good as the best, and the override that sets it."""
    ties = sum(m.above_best[0] <= 0 for m in search.measured[1:])
    told = f"{ties} of the others may be as good" if ties else "the others are worse"
    return (
        f"{len(search.measured)} of {search.candidates} shapes measured, fitted to "
        f"{search.fitted_texts:,} texts and judged on {search.judged_texts} others; none was "
        f"trained.\nThe best of them ({told}, by 95 % intervals over the texts):\n"
        f'"{search.override}"'
    )
