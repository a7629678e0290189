"""The entries of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# How people write the metrics that mteb computes.
METRIC_TITLES = {
    "cosine_spearman": "Spearman",
    "cosine_pearson": "Pearson",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "ndcg_at_10": "nDCG@10",
    "mrr_at_10": "MRR@10",
    "recall_at_100": "Recall@100",
    "map_at_100": "MAP@100",
}


def main_scores(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entry of each task and mode that decides: Spearman correlation or nDCG@10."""
    return [entry for entry in evaluation["tasks"] if entry["main"]]
