"""What a trimmed vocabulary saves and loses, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bge_pruning.reports.markdown import escape

_COLUMNS = (
    *("corpus", "role", "texts", "tokens", "tokens kept", "texts read alike", "length"),
    *("unknown before", "unknown after"),
)


def render_vocabulary(report: Mapping[str, Any]) -> list[str]:
    """A sentence, a table with a row for each corpus, and what its columns mean.

    Args:
        report: As :func:`bge_pruning.export.vocabulary_texts.build_report` makes it.
    """
    vocabulary, parameters = report["vocabulary"], report["parameters"]
    scripts = ", ".join(name.title() for name in report["scripts"]) or "none"
    return [
        f"{vocabulary['kept']:,} of {vocabulary['source']:,} tokens are kept, "
        f"{vocabulary['required']:,} of them whatever the texts hold (special tokens, and single "
        f"characters; scripts: {scripts}). {vocabulary['rows_saved']:,} rows of the embeddings and "
        f"{parameters['saved']:,} parameters ({parameters['share_saved']:.1%} of the model) are "
        f"saved.",
        _table(report["coverage"]),
        "*Tokens kept* is the share of a corpus's tokens that the vocabulary still has; *texts "
        "read alike* the share of its texts that become the very same tokens, and so the very same "
        "vectors; *length* the number of tokens after by that before.",
    ]


def _table(rows: list[Mapping[str, Any]]) -> str:
    lines = [_COLUMNS, ("---", "---", *("---:",) * (len(_COLUMNS) - 2)), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    # A card is published; where somebody keeps a corpus is nobody's business.
    path = Path(row["corpus"])
    corpus = path.name if path.is_absolute() else row["corpus"]
    return (
        *(escape(corpus), row["role"], f"{row['texts']:,}", f"{row['tokens']:,}"),
        *(f"{row[name]:.2%}" for name in ("tokens_kept", "texts_same")),
        f"{row['growth']:.3f}",
        *(f"{row[name]:.2%}" for name in ("unknown_before", "unknown_after")),
    )
