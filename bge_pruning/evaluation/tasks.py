"""Collections that are in memory as tasks of ``mteb``, by its interface for custom tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bge_pruning.datasets.retrieval_collection import (
    RetrievalCollection,
    read_collection,
    read_mteb_collection,
)


def beir_task(folder: str | Path, split: str = "test") -> Any:
    """A retrieval task of mteb over a collection in BEIR layout.

    Args:
        folder: The collection; its name is the task's.
        split: Judgements to evaluate with.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is wrong; the message names file and line.
    """
    folder = Path(folder)
    return _local_task(folder.resolve().name, read_collection(folder, split), split)


def mteb_task(task_name: str, split: str, subset: str | None = None) -> Any:
    """A split of a retrieval task that mteb knows by name, loaded at once.

    Args:
        task_name: Its name.
        split: Judgements to evaluate with.
        subset: Often a language; needed if the task has several.

    Raises:
        FileNotFoundError: If mteb cannot load the data.
        ValueError: If there is no such task, split or subset, or it cannot be evaluated here.
    """
    return _local_task(task_name, read_mteb_collection(task_name, split, subset), split)


def _local_task(name: str, collection: RetrievalCollection, split: str) -> Any:
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description=f"Local collection, judged by its split {split}.",
            dataset={"path": name, "revision": "local"},
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
