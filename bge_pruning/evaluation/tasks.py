"""Tasks to evaluate on, as tasks of ``mteb``: local files, or tasks that mteb knows by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bge_pruning.config.names import HELD_OUT, LANGUAGE
from bge_pruning.datasets.mteb_dataloader import query_text
from bge_pruning.datasets.mteb_tasks import data_of, load_split, load_tasks, random_state_kept
from bge_pruning.datasets.parallel_texts import find_parallel, parallel_collection
from bge_pruning.datasets.retrieval_collection import (
    RetrievalCollection,
    check_mteb_data,
    choose_split,
    read_collection,
)
from bge_pruning.datasets.rows import BadRows
from bge_pruning.datasets.sts_dataloader import read_sts

log = logging.getLogger(__name__)

SIMILARITY, RETRIEVAL = "similarity", "retrieval"
# mteb requires the languages of a task; nothing depends on them here.
LANGUAGES = ["eng-Latn"]


@dataclass
class Task:
    """One split of one subset of a task.

    Attributes:
        mteb_task: A task of mteb with its data loaded, set to one split and subset.
        subset: The subset, ``default`` if there is one only.
        translated: Whether queries and passages are translations of each other.
        by_query: nDCG@10 of each query in the last evaluation of a retrieval task.
    """

    name: str
    kind: str
    mteb_task: Any
    split: str = "test"
    subset: str = "default"
    translated: bool = False
    by_query: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind == RETRIEVAL:
            self._keep_scores_of_queries()

    def _keep_scores_of_queries(self) -> None:
        """Keep them in the hook with which mteb shows a task the scores of its queries."""
        given = self.mteb_task.task_specific_scores

        def keep(
            scores: Mapping[str, Mapping[str, float]], *arguments: Any, **kwargs: Any
        ) -> dict[str, float]:
            self.by_query = {query: row["ndcg_cut_10"] for query, row in scores.items()}
            return given(scores, *arguments, **kwargs)

        self.mteb_task.task_specific_scores = keep

    def pairs(self) -> tuple[list[str], list[str], list[float]]:
        """First sentences, second sentences and gold scores of a similarity task."""
        data = self.mteb_task.dataset
        rows = data.get(self.subset, data)[self.split]
        first, second = self.mteb_task.column_names
        return list(rows[first]), list(rows[second]), [float(score) for score in rows["score"]]

    def queries(self) -> list[str]:
        """Texts of the queries of a retrieval task, as it is searched with them."""
        rows = data_of(self.mteb_task, self.split)["queries"]
        return [query_text(row, f"query {row['id']}") for row in rows]

    def passages(self) -> list[str]:
        """Texts of the corpus of a retrieval task, without their titles."""
        return list(data_of(self.mteb_task, self.split)["corpus"]["text"])


def find_tasks(
    sts: Sequence[str],
    retrieval: Sequence[str],
    split: str | None = None,
    parallel: Mapping[str, Sequence[str]] | None = None,
    lines: str | None = HELD_OUT,
) -> list[Task]:
    """Find the tasks of files, folders or mteb's names, and load their data.

    Args:
        sts: Files with scored sentence pairs, or names such as ``STSBenchmark`` or
            ``STS17:en-de`` (one subset).
        retrieval: Folders in BEIR layout, or names such as ``SciFact``.
        split: Of the folders, see :func:`beir_task`.
        parallel: Pairs of languages by the path of line-parallel files, see :func:`parallel_task`.
        lines: Which of their lines.

    Raises:
        FileNotFoundError: If a file or the data of a named task is missing.
        ValueError: If there is no task, a row is invalid, or two tasks have one name.
    """
    if not sts and not retrieval and not parallel:
        raise ValueError("no task to evaluate on. To fix, give at least one.")
    tasks: list[Task] = []
    for name in sts:
        is_file = Path(name).suffix or "/" in name or Path(name).exists()
        tasks += [sts_task(name)] if is_file else named_tasks(name, SIMILARITY)
    for name in retrieval:
        is_folder = "/" in name or Path(name).exists()
        tasks += [beir_task(name, split)] if is_folder else named_tasks(name, RETRIEVAL)
    for path, pairs in (parallel or {}).items():
        tasks += [parallel_task(path, [pair], lines) for pair in pairs]
    check_names(tasks)
    return tasks


def check_names(tasks: Sequence[Task]) -> None:
    """Refuse two tasks of one name: scores are written by it."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two tasks are called {name}. To fix, rename a file or folder: the name is the "
                f"task's."
            )


def named_tasks(name: str, kind: str) -> list[Task]:
    """Load the splits and subsets that mteb evaluates of a ``TASK``, or of one ``TASK:SUBSET``."""
    task_name, _, subset = name.partition(":")
    types = ("STS",) if kind == SIMILARITY else ("Retrieval",)
    try:
        loaded = load_tasks(task_name, subset or None, types)
    except ValueError as error:
        raise ValueError(f"{name}: no such file or folder; as a name, {error}") from error
    splits = {split for _, split, _ in loaded}
    tasks = []
    for mteb_task, split, part in loaded:
        words = [task_name, *([part] if part != "default" else [])]
        words += [split] if len(splits) > 1 else []
        tasks.append(Task(":".join(words), kind, mteb_task, split, part))
        if kind == RETRIEVAL:
            data, own = data_of(mteb_task, split), mteb_task.ignore_identical_ids
            check_mteb_data(tasks[-1].name, data, own)
    return tasks


def sts_task(file: str | Path) -> Task:
    """Make a similarity task of columns ``sentence1``, ``sentence2``, ``score`` (0 to 5) of a file.

    Raises:
        ValueError: If a row is invalid, or all scores are equal; the message names the file.
    """
    file = Path(file)
    pairs = read_sts(file)
    if len(set(pairs.scores)) < 2:
        raise ValueError(
            f"{file}: every gold score is {pairs.scores[0]:g}, so no correlation is defined. To "
            f"fix, choose a file with different scores."
        )
    columns = {"sentence1": pairs.sentences1, "sentence2": pairs.sentences2, "score": pairs.scores}
    return similarity_task(file.stem, columns)


def similarity_task(name: str, columns: Mapping[str, list]) -> Task:
    """Make a similarity task of pairs in memory, by the names of their columns."""
    from datasets import Dataset, DatasetDict

    with random_state_kept():
        from mteb.abstasks import AbsTaskSTS

        class LocalSimilarity(AbsTaskSTS):
            metadata = _metadata(name, "STS", "test", "cosine_spearman")

            def load_data(self, *arguments: Any, **kwargs: Any) -> None:
                """Use the pairs that have been read."""
                self.dataset = DatasetDict(test=Dataset.from_dict(dict(columns)))
                self.data_loaded = True

        task = LocalSimilarity()
        task.load_data()
    return Task(name, SIMILARITY, task)


def beir_task(folder: str | Path, split: str | None = None) -> Task:
    """Make a retrieval task of a collection in BEIR layout; its name is the folder's.

    Without ``split`` it is judged by the split test, or by the only one that there is.
    """
    folder = Path(folder)
    split = split or choose_split(folder)
    return retrieval_task(folder.resolve().name, read_collection(folder, split), split)


def parallel_task(
    path: str, languages: Sequence[str], lines: str | None = None, skip: bool = False
) -> Task:
    """Make a retrieval task of line-parallel files; its name is the files' with the languages.

    Args:
        path: Of a file, with ``{language}`` in it.
        languages: Of queries and passages: two, or a pair such as ``de-en``.
        lines: Which lines, see :func:`bge_pruning.datasets.text_files.choose_lines`.
        skip: Leave invalid lines out and count them.
    """
    texts = find_parallel(path, languages, lines)
    collection = parallel_collection(texts, BadRows(skip))
    pair, stem = "-".join(texts.pairs[0]), Path(path).name.partition(".")[0]
    name = stem.replace(LANGUAGE, pair) if LANGUAGE in stem else f"{stem}-{pair}"
    task = retrieval_task(name, collection, lines or ":")
    task.translated = True
    return task


def mteb_task(task_name: str, split: str, subset: str | None = None) -> Task:
    """Load one split of a retrieval task that mteb knows by name.

    Raises:
        FileNotFoundError: If mteb cannot load the data.
        ValueError: If there is no such task, split or subset, or its data are invalid, see
            :func:`bge_pruning.datasets.retrieval_collection.check_mteb_data`.
    """
    place, task = load_split(task_name, split, subset, training=False)
    check_mteb_data(place, data_of(task, split), task.ignore_identical_ids)
    return Task(task_name, RETRIEVAL, task, split, *task.hf_subsets)


def retrieval_task(name: str, collection: RetrievalCollection, split: str) -> Task:
    """Make a retrieval task of a collection in memory."""
    from datasets import Dataset

    with random_state_kept():
        from mteb.abstasks import AbsTaskRetrieval

        class LocalRetrieval(AbsTaskRetrieval):
            metadata = _metadata(name, "Retrieval", split, "ndcg_at_10")
            ignore_identical_ids = collection.own

            def load_data(self, *arguments: Any, **kwargs: Any) -> None:
                """Use the collection that has been read."""
                data = {
                    "corpus": Dataset.from_list(collection.corpus),
                    "queries": Dataset.from_list(collection.queries),
                    "relevant_docs": collection.relevant,
                    "top_ranked": None,
                }
                self.dataset = {"default": {split: data}}
                self.data_loaded = True

        task = LocalRetrieval()
        task.load_data()
    return Task(name, RETRIEVAL, task, split)


def _metadata(name: str, kind: str, split: str, main_score: str) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name,
        description=f"Local data, split {split}.",
        dataset={"path": name, "revision": "local"},
        type=kind,
        eval_langs=LANGUAGES,
        eval_splits=[split],
        main_score=main_score,
    )
