"""The metadata at the head of a model card, as the Hugging Face hub reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bge_pruning.model_io.hub import display_name, hub_name, hub_page
from bge_pruning.utils.tasks import METRIC_TITLES, main_scores

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAGS = ("sentence-transformers", "feature-extraction", "xlm-roberta", "structured-pruning")
# By the kind of a task: type and name, as sentence-transformers writes them.
TASKS = {
    "similarity": ("semantic-similarity", "Semantic Similarity"),
    "retrieval": ("information-retrieval", "Information Retrieval"),
}


def render_header(info: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> str:
    """YAML between two lines of ``---``.

    Args:
        info: Content of ``pruning.json``.
        evaluation: What :func:`bge_pruning.evaluation.evaluate.evaluate` returns; its main scores
            become the model's results.
    """
    from huggingface_hub import ModelCardData

    source = info["source"]
    origin, license_id = hub_name(source), source.get("license")
    fields: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": list(TAGS),
        "license": license_id,
        "base_model": origin,
    }
    if license_id == "other" and origin:
        fields["license_link"] = hub_page(origin)
    if evaluation is not None and (results := _results(evaluation)):
        name = f"{display_name(source).rpartition('/')[2]}-pruned"
        fields.update(model_name=name, eval_results=results)
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---"


def _results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    results = []
    for entry in main_scores(evaluation):
        kind, title = TASKS[entry["kind"]]
        results.append(
            EvalResult(
                task_type=kind,
                task_name=title,
                # Results of the same task and dataset are one entry of the hub.
                dataset_type=re.sub(r"[^\w.-]+", "-", entry["task"]),
                dataset_name=entry["task"],
                metric_type=entry["metric"],
                metric_name=f"{METRIC_TITLES[entry['metric']]}, {entry['mode']}",
                metric_value=round(entry["value"], 4),
            )
        )
    return results
