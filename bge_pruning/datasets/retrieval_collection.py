"""A whole retrieval collection to evaluate on: in BEIR layout, or a task that mteb knows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_pruning.datasets import mteb_dataloader
from bge_pruning.datasets.mteb_tasks import load_split
from bge_pruning.datasets.rows import BadRows

log = logging.getLogger(__name__)

# trec_eval, which mteb calls, takes memory and minutes in proportion to the largest score.
LARGEST = 1_000_000


@dataclass(frozen=True)
class RetrievalCollection:
    """A collection: passages with ``id``, ``title`` and ``text``, and the judged queries likewise.

    A query may have an ``instruction``. ``relevant`` holds the scores by query and passage.
    """

    corpus: list[dict[str, str]]
    queries: list[dict[str, str]]
    relevant: dict[str, dict[str, int]]


def read_collection(folder: str | Path, split: str = "test") -> RetrievalCollection:
    """Read a collection, judged by ``qrels/<split>.tsv``.

    Raises:
        ValueError: If a line is wrong, an id is there twice or unknown, or nothing is judged
            relevant; the message names file and line.
    """
    folder, bad = Path(folder), BadRows()
    qrels = folder / "qrels" / f"{split}.tsv"
    judged = mteb_dataloader.read_qrels(qrels, bad)
    if not any(score > 0 for pairs in judged.values() for score, _ in pairs.values()):
        raise ValueError(f"{qrels}: judges no passage relevant. To fix, choose another split.")
    _check_scores(judged, qrels)
    corpus = _read_texts(folder / "corpus.jsonl", bad)
    queries = _read_texts(folder / "queries.jsonl", bad)
    _check_ids(judged, queries, corpus, qrels)
    return RetrievalCollection(
        list(corpus.values()),
        [queries[name] for name in judged],
        {q: {p: int(score) for p, (score, _) in pairs.items()} for q, pairs in judged.items()},
    )


def choose_split(folder: Path) -> str:
    """The split of a collection that is evaluated where none is named: test, or the only one.

    Raises:
        ValueError: If there are several, and none is called test; the message names them.
    """
    splits = sorted(path.stem for path in folder.glob("qrels/*.tsv"))
    if "test" in splits or not splits:  # without any, the reader says which file is missing
        return "test"
    if len(splits) > 1:
        raise ValueError(
            f"{folder} has no split test, but {', '.join(splits)}. To fix, choose one with --split."
        )
    log.info("%s is evaluated on its only split, %s", folder, splits[0])
    return splits[0]


def collection_files(folder: Path, split: str) -> list[Path]:
    """The files that a split of a collection in BEIR layout consists of."""
    names = ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")
    return [folder / name for name in names]


def read_mteb_collection(
    task_name: str, split: str = "test", subset: str | None = None
) -> RetrievalCollection:
    """Read a split of a retrieval task that mteb knows by name, from its cache or the hub.

    Raises:
        FileNotFoundError: If mteb cannot load the data.
        ValueError: If there is no such task, split or subset, the task does not search a whole
            corpus, a text is empty, or nothing is judged relevant.
    """
    place, data = load_split(task_name, split, subset, training=False)
    if data.get("top_ranked"):
        raise ValueError(
            f"{place}: lists the passages that each query may rank, and whole corpora are searched "
            f"here. To fix, choose a task of type Retrieval."
        )
    relevant = {
        str(query): {str(passage): int(score) for passage, score in pairs.items()}
        for query, pairs in data["relevant_docs"].items()
    }
    if not any(score > 0 for pairs in relevant.values() for score in pairs.values()):
        raise ValueError(f"{place}: judges no passage relevant. To fix, choose another split.")
    corpus = [
        _checked(row, mteb_dataloader.passage_text, f"{place}: passage") for row in data["corpus"]
    ]
    queries = [
        _checked(row, mteb_dataloader.query_text, f"{place}: query")
        for row in data["queries"]
        if str(row["id"]) in relevant
    ]
    known = {row["id"] for row in queries}  # judgements of queries without a text are left out
    return RetrievalCollection(corpus, queries, {q: relevant[q] for q in relevant if q in known})


def _checked(
    row: Mapping[str, Any], check: Callable[[Mapping[str, Any], str], str], kind: str
) -> dict[str, str]:
    """A row of strings, whose text is there."""
    check(row, f"{kind} {row['id']}")
    columns = ("id", "title", "text", "instruction")
    return {name: str(row[name]) for name in columns if row.get(name) is not None}


def _read_texts(path: Path, bad: BadRows) -> dict[str, dict[str, str]]:
    texts: dict[str, dict[str, str]] = {}
    check = mteb_dataloader.passage_text if path.stem == "corpus" else mteb_dataloader.query_text
    for where, row in mteb_dataloader.json_records(path, bad):
        name = str(row["_id"])
        if name in texts:
            raise ValueError(f"{where}: _id '{name}' is there twice. To fix, remove one line.")
        check(row, where)
        texts[name] = {"id": name, "title": row.get("title") or "", "text": row["text"]}
    return texts


def _check_scores(judged: mteb_dataloader.Judged, qrels: Path) -> None:
    for pairs in judged.values():
        for score, line in pairs.values():
            if abs(score) > LARGEST:
                raise ValueError(
                    f"{qrels}:{line}: score {score:g} is not in [-{LARGEST}, {LARGEST}]. To fix, "
                    f"see that the columns are query, passage and how relevant it is."
                )


def _check_ids(judged: mteb_dataloader.Judged, queries: dict, corpus: dict, qrels: Path) -> None:
    for query, pairs in judged.items():
        for passage, (_, line) in pairs.items():
            for kind, name, known in (("query", query, queries), ("corpus", passage, corpus)):
                if name not in known:
                    raise ValueError(
                        f"{qrels}:{line}: {kind}-id '{name}' is not in the {kind} file. To fix, "
                        f"use the files of one collection."
                    )
