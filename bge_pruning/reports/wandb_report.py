"""Log a report and its scores on W&B, which is imported only for an open run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_pruning.reports.report import CAPTIONS, HTML
from bge_pruning.reports.report_tables import score_header, score_rows
from bge_pruning.utils.records import EvaluationRecord

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run


def log_report(run: Run, folder: Path) -> None:
    """Log a folder's report and pictures in an open run: ``report/page``, ``report/gates``, ..."""
    import wandb

    page = (folder / HTML).read_text(encoding="utf-8")
    # Not injected: the page has a style of its own.
    media: dict[str, Any] = {"report/page": wandb.Html(page, inject=False)}
    for name, caption in CAPTIONS.items():
        if (folder / name).is_file():
            key = f"report/{Path(name).stem}"
            media[key] = wandb.Image(str(folder / name), caption=caption)
    run.log(media)


def log_scores(run: Run, evaluation: EvaluationRecord) -> None:
    """Log scores as a table, and each as ``scores/<task>/<mode>/<metric>`` in the summary."""
    import wandb

    rows = score_rows(evaluation)
    if rows:
        run.log({"scores": wandb.Table(columns=score_header(evaluation), data=rows)})
    for entry in evaluation.main_scores():
        key = f"scores/{entry.task}/{entry.mode}/{entry.metric}"
        run.summary[key] = entry.value
        if entry.retention is not None:
            run.summary[f"{key}_kept"] = entry.retention
