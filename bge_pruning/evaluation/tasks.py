"""Local files as tasks of ``mteb``, through its interface for custom tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bge_pruning.datasets.retrieval_collection import read_collection


def beir_task(folder: str | Path, split: str = "test") -> Any:
    """A retrieval task of mteb over a collection in BEIR layout.

    Args:
        folder: The collection; its name is the task's.
        split: Judgements to evaluate with.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is wrong; the message names file and line.
    """
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    folder = Path(folder)
    collection = read_collection(folder, split)

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=folder.resolve().name,
            description=f"Local collection, judged by qrels/{split}.tsv.",
            dataset={"path": str(folder), "revision": "local"},
            type="Retrieval",
            eval_langs=["eng-Latn"],  # mteb asks for one; nothing depends on it
            eval_splits=[split],
            main_score="ndcg_at_10",
        )

        def load_data(self, *arguments: Any, **kwargs: Any) -> None:
            """Nothing to fetch: the files have been read."""
            data = {
                "corpus": Dataset.from_list(collection.corpus),
                "queries": Dataset.from_list(collection.queries),
                "relevant_docs": collection.relevant,
                "top_ranked": None,
            }
            self.dataset = {"default": {split: data}}
            self.data_loaded = True

        def task_specific_scores(
            self, scores: dict[str, dict[str, float]], *arguments: Any, **kwargs: Any
        ) -> dict[str, float]:
            """Keep what mteb averages: nDCG@10 of each query."""
            self.by_query = {query: row["ndcg_cut_10"] for query, row in scores.items()}
            return {}

    return LocalRetrieval()
