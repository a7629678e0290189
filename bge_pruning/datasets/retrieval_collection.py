"""A whole retrieval collection to evaluate on: in BEIR layout, or a task that mteb knows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_pruning.datasets import mteb_dataloader
from bge_pruning.datasets.rows import BadRows

log = logging.getLogger(__name__)

# trec_eval, which mteb calls, takes memory and minutes in proportion to the largest score.
LARGEST = 1_000_000


@dataclass(frozen=True)
class RetrievalCollection:
    """A collection: passages with ``id``, ``title`` and ``text``, and the judged queries likewise.

    A query may have an ``instruction``. ``relevant`` holds the scores by query and passage, also of
    passages that are not there; ``own`` says that a passage of a query's id is the query itself.
    """

    corpus: list[dict[str, str]]
    queries: list[dict[str, str]]
    relevant: dict[str, dict[str, int]]
    own: bool


def read_collection(folder: str | Path, split: str = "test") -> RetrievalCollection:
    """Read a collection, judged by ``qrels/<split>.tsv``.

    Judgements of what is not there, passages that are queries too, and lines that repeat another
    are counted in a warning, see :func:`bge_pruning.datasets.mteb_dataloader.note_unknown`.

    Raises:
        ValueError: If a line is wrong, an id has two texts, or nothing that is there is judged
            relevant; the message names file and line.
    """
    bad = BadRows()
    *files, qrels = mteb_dataloader.collection_files(folder, split)
    judged = mteb_dataloader.read_qrels(qrels, bad)
    _check_scores(judged, qrels)
    corpus, queries = (_read_texts(path, bad) for path in files)
    mteb_dataloader.note_unknown(judged, queries, corpus, str(qrels), bad)
    there = {name: pairs for name, pairs in judged.items() if name in queries}
    relevant = {q: {p: int(score) for p, (score, _) in row.items()} for q, row in there.items()}
    _check_relevant(relevant, corpus, str(qrels))
    own = mteb_dataloader.note_own(
        None, there, _text_of(queries), _text_of(corpus), str(qrels), bad
    )
    bad.report("evaluation")
    return RetrievalCollection(
        list(corpus.values()), [queries[name] for name in there], relevant, own
    )


def choose_split(folder: Path) -> str:
    """The split of a collection that is evaluated where none is named: test, or the only one.

    Raises:
        ValueError: If there are several, and none is called test; the message names them.
    """
    paths = [path for end in ("tsv", "tsv.gz") for path in folder.glob(f"qrels/*.{end}")]
    splits = sorted({path.name.split(".tsv")[0] for path in paths})
    if "test" in splits or not splits:  # without any, the reader says which file is missing
        return "test"
    if len(splits) > 1:
        raise ValueError(
            f"{folder} has no split test, but {', '.join(splits)}. To fix, choose one with --split."
        )
    log.info("%s is evaluated on its only split, %s", folder, splits[0])
    return splits[0]


def check_mteb_data(place: str, data: Mapping[str, Any], own: bool) -> None:
    """Check the data of a retrieval task that mteb knows by name, and warn as for a folder.

    Args:
        own: Whether mteb ignores passages of a query's id.

    Raises:
        ValueError: If the task does not search a whole corpus, a query is empty, or nothing that is
            there is judged relevant.
    """
    if data.get("top_ranked"):
        raise ValueError(
            f"{place}: lists the passages that each query may rank, and whole corpora are searched "
            f"here. To fix, choose a task of type Retrieval."
        )
    bad, relevant = BadRows(), data["relevant_docs"]
    judged = {
        str(query): {str(passage): (float(score), 0) for passage, score in pairs.items()}
        for query, pairs in relevant.items()
    }
    queries, corpus = (
        dict.fromkeys(map(str, data[name]["id"]), "") for name in ("queries", "corpus")
    )
    mteb_dataloader.note_unknown(judged, queries, corpus, place, bad)
    _check_relevant({q: pairs for q, pairs in relevant.items() if str(q) in queries}, corpus, place)
    mteb_dataloader.note_own(own, judged, queries, corpus, place, bad)
    for row in data["queries"]:
        mteb_dataloader.query_text(row, f"{place}: query {row['id']}")
    bad.report("evaluation")


def _text_of(rows: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {name: row["text"] for name, row in rows.items()}


def _read_texts(path: Path, bad: BadRows) -> dict[str, dict[str, str]]:
    texts: dict[str, dict[str, str]] = {}
    lines: dict[str, str] = {}
    again = empty = 0
    for where, row in mteb_dataloader.json_records(path, bad):
        if path.name.startswith("corpus"):
            empty += not mteb_dataloader.passage_text(row, where, empty=True)
        else:
            mteb_dataloader.query_text(row, where)
        name, instruction = str(row["_id"]), row.get("instruction")
        found = {"id": name, "title": row.get("title") or "", "text": row["text"]}
        found |= {"instruction": instruction} if instruction else {}
        if texts.setdefault(name, found) != found:
            raise ValueError(
                f"{where}: _id '{name}' has another text than at {lines[name]}. To fix, remove one "
                f"of the lines."
            )
        again += lines.setdefault(name, where) != where
    if again:
        bad.notes.append(f"{path}: {again:,} lines repeat another one, and count once")
    if empty:
        bad.notes.append(f"{path}: {empty:,} passages are empty, and are searched as such")
    return texts


def _check_relevant(
    relevant: Mapping[str, Mapping[str, int]], corpus: Mapping[str, Any], place: str
) -> None:
    if not any(s > 0 and str(p) in corpus for row in relevant.values() for p, s in row.items()):
        raise ValueError(
            f"{place}: judges no passage relevant that is there. To fix, choose another split, or "
            f"use the files of one collection."
        )


def _check_scores(judged: mteb_dataloader.Judged, qrels: Path) -> None:
    for pairs in judged.values():
        for score, line in pairs.values():
            if abs(score) > LARGEST:
                raise ValueError(
                    f"{qrels}:{line}: score {score:g} is not in [-{LARGEST}, {LARGEST}]. To fix, "
                    f"see that the columns are query, passage and how relevant it is."
                )
