"""A whole retrieval collection in BEIR layout, to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bge_pruning.datasets.mteb_dataloader import (
    Judged,
    json_records,
    passage_text,
    query_text,
    read_qrels,
)
from bge_pruning.datasets.rows import BadRows


@dataclass(frozen=True)
class RetrievalCollection:
    """A collection.

    Attributes:
        corpus: Every passage: ``id``, ``title`` and ``text``.
        queries: The judged queries: ``id`` and ``text``.
        relevant: Score of each judged passage, by query and passage.
    """

    corpus: list[dict[str, str]]
    queries: list[dict[str, str]]
    relevant: dict[str, dict[str, int]]


def read_collection(folder: str | Path, split: str = "test") -> RetrievalCollection:
    """Read a collection, judged by ``qrels/<split>.tsv``.

    Args:
        folder: The collection.
        split: Name of the judgements.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is wrong, an id is there twice or unknown, or nothing is judged
            relevant; the message names file and line.
    """
    folder, bad = Path(folder), BadRows()
    qrels = folder / "qrels" / f"{split}.tsv"
    judged = read_qrels(qrels, bad)
    if not any(score > 0 for pairs in judged.values() for score, _ in pairs.values()):
        raise ValueError(f"{qrels}: judges no passage relevant. To fix, choose another split.")
    corpus = _read_texts(folder / "corpus.jsonl", bad)
    queries = _read_texts(folder / "queries.jsonl", bad)
    _check_ids(judged, queries, corpus, qrels)
    return RetrievalCollection(
        list(corpus.values()),
        [queries[name] for name in judged],
        {q: {p: int(score) for p, (score, _) in pairs.items()} for q, pairs in judged.items()},
    )


def _read_texts(path: Path, bad: BadRows) -> dict[str, dict[str, str]]:
    texts: dict[str, dict[str, str]] = {}
    check = passage_text if path.stem == "corpus" else query_text
    for where, row in json_records(path, bad):
        name = str(row["_id"])
        if name in texts:
            raise ValueError(f"{where}: _id '{name}' is there twice. To fix, remove one line.")
        check(row, where)
        texts[name] = {"id": name, "title": row.get("title") or "", "text": row["text"]}
    return texts


def _check_ids(judged: Judged, queries: dict, corpus: dict, qrels: Path) -> None:
    for query, pairs in judged.items():
        for passage, (_, line) in pairs.items():
            for kind, name, known in (("query", query, queries), ("corpus", passage, corpus)):
                if name not in known:
                    raise ValueError(
                        f"{qrels}:{line}: {kind}-id '{name}' is not in the {kind} file. To fix, "
                        f"use the files of one collection."
                    )
