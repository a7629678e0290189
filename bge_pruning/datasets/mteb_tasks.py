"""Training rows from a retrieval task that ``mteb`` knows by name, and fetches and caches."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from bge_pruning.datasets.mteb_dataloader import Judgement, Judgements, join_title, judged_rows
from bge_pruning.datasets.rows import BadRows, Row


def read_mteb(
    name: str, split: str = "train", subset: str | None = None, bad: BadRows | None = None
) -> Iterator[Row]:
    """Read the judged queries of a split of a task.

    Args:
        name: Name of a retrieval task, such as ``SciFact``.
        split: Its split; the train split is the one to train on.
        subset: One of its subsets (often a language), if it has several.
        bad: What to do with rows that are wrong.

    Yields:
        A row for each query that has a positive, in the order of the task's queries.

    Raises:
        FileNotFoundError: If the data cannot be had.
        ValueError: If there is no such task, subset or split, or a row is wrong.
    """
    data, where = _load(name, split, subset), f"{name}[{split}]"
    bad = bad or BadRows()
    queries = dict(_texts(data["queries"], f"{where} query", bad))
    relevant = data["relevant_docs"]
    # mteb gives the judgements in no fixed order, the queries in that of their file.
    judged: Judgements = {
        query: {
            document: Judgement(score, f"{where} query {query}")
            for document, score in sorted(relevant[query].items())
        }
        for query in (*queries, *sorted(set(relevant) - set(queries)))
        if query in relevant
    }
    wanted = {document for pairs in judged.values() for document in pairs}
    corpus = dict(_texts(data["corpus"], f"{where} passage", bad, wanted))
    yield from judged_rows(judged, queries, corpus, bad)


def read_mteb_corpus(
    name: str, split: str = "train", subset: str | None = None, bad: BadRows | None = None
) -> Iterator[Row]:
    """Read every passage of a task, judged or not.

    Args:
        name: See :func:`read_mteb`, as the other arguments.
        split: Its split.
        subset: Its subset.
        bad: What to do with rows that are wrong.

    Yields:
        A row for each passage, in order.
    """
    data = _load(name, split, subset)
    for _, text in _texts(data["corpus"], f"{name}[{split}] passage", bad or BadRows()):
        yield Row(text)


def fingerprint_mteb(name: str, split: str, subset: str | None) -> str:
    """What the data of a task is known by: its repository and revision. Fetches nothing.

    Raises:
        ValueError: If there is no such task or subset.
    """
    task = _find(name, split, subset)
    dataset = task.metadata.dataset
    return f"{dataset['path']} {dataset['revision']} {split} {_subset(task, subset)}"


def _texts(
    rows: Any, where: str, bad: BadRows, wanted: set[str] | None = None
) -> Iterator[tuple[str, str]]:
    for row in rows:
        if wanted is not None and row["id"] not in wanted:
            continue
        with bad.guard():
            text = join_title(row, f"{where} {row['id']}")
            yield row["id"], text


def _find(name: str, split: str, subset: str | None) -> Any:
    """The task, not loaded yet."""
    import mteb
    from mteb.abstasks import AbsTaskRetrieval

    try:
        task = mteb.get_task(name, eval_splits=[split])
    except KeyError:
        known = sorted(task.metadata.name for task in mteb.get_tasks(task_types=["Retrieval"]))
        close = difflib.get_close_matches(name, known, n=3)
        fix = f"did you mean {' or '.join(close)}?" if close else "see mteb.get_tasks()."
        raise ValueError(f"mteb has no task '{name}'. To fix, {fix}") from None
    if not isinstance(task, AbsTaskRetrieval):
        raise ValueError(
            f"mteb task {name} is of type {task.metadata.type}, not a retrieval task. To fix, name "
            f"one that is."
        )
    _subset(task, subset)
    return task


def _subset(task: Any, subset: str | None) -> str:
    subsets = list(task.hf_subsets)
    if subset is None and len(subsets) == 1:
        return subsets[0]
    if subset not in subsets:
        raise ValueError(
            f"mteb task {task.metadata.name} has the subsets {', '.join(subsets)}, not {subset}. "
            f"To fix, set subset of the source to one of them."
        )
    return subset


def _load(name: str, split: str, subset: str | None) -> dict[str, Any]:
    """Corpus, queries and judgements of a split."""
    task = _find(name, split, subset)
    chosen = _subset(task, subset)
    task.hf_subsets = [chosen]
    try:
        task.load_data()
    # The hub's client, its builders and its file systems raise all of these.
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"mteb task {name}: cannot load split '{split}' ({type(error).__name__}: "
            f"{str(error).strip()[:300]}). To fix, check that the task has this split and that the "
            f"hub can be reached; or download the collection in BEIR layout and use kind beir."
        ) from None
    return task.dataset[chosen][split]
