"""Training rows from retrieval collections: the judged queries, and all passages to mine among.

A collection is a folder in BEIR layout, with ``corpus.jsonl`` (``_id``, ``title``, ``text``),
``queries.jsonl`` (``_id``, ``text``) and ``qrels/<split>.tsv`` (header, then query id, corpus id,
score), or a task that ``mteb`` knows by name. A passage judged above 0 is a positive of its query,
any other judged one a given negative. A passage reads as BEIR and mteb embed it: title, space,
text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bge_pruning.datasets.mteb_tasks import find_task, load_split, random_state_kept
from bge_pruning.datasets.rows import BadRows, Row
from bge_pruning.datasets.text_files import check_text, parse_row, read_lines

log = logging.getLogger(__name__)

HEADER = ("query-id", "corpus-id", "score")

# Where it stands, and its columns.
Record = tuple[str, Mapping[str, Any]]
# Score and line of each judged passage, by query; line 0 where there are no lines.
Judged = dict[str, dict[str, tuple[float, int]]]


def read_beir(
    folder: str | Path, split: str = "train", bad: BadRows | None = None
) -> Iterator[Row]:
    """Read a folder in BEIR layout: a row for each query with a positive, as they are judged.

    Wrong lines, unknown ids, and queries whose positives are all among those are ``bad``. A query
    that was judged to have no positive is not wrong.

    Raises:
        ValueError: If a line is wrong or an id is unknown; the message names file and line. If a
            file holds no rows, or no query a positive.
    """
    folder, bad = Path(folder), bad or BadRows()
    qrels = folder / "qrels" / f"{split}.tsv"
    judged = read_qrels(qrels, bad)
    queries = json_records(folder / "queries.jsonl", bad)
    corpus = json_records(folder / "corpus.jsonl", bad)
    yield from _judged_rows(judged, queries, corpus, str(qrels), bad)


def read_corpus(folder: str | Path, bad: BadRows | None = None) -> Iterator[Row]:
    """Read all passages of a folder in BEIR layout, judged or not."""
    bad = bad or BadRows()
    yield from _passage_rows(json_records(Path(folder) / "corpus.jsonl", bad), bad)


def read_mteb(
    task_name: str, split: str = "train", subset: str | None = None, bad: BadRows | None = None
) -> Iterator[Row]:
    """Read the judged queries of an mteb task: a row for each with a positive, in their order.

    The subset, often a language, is needed if the task has several.

    Raises:
        ValueError: If there is no such task, split or subset, the task is of another kind, a row is
            wrong, or no query has a positive.
    """
    bad = bad or BadRows()
    place, data = load_split(task_name, split, subset)
    queries, relevant = data["queries"], data["relevant_docs"]
    # mteb groups the judgements by query in an order that changes from run to run.
    order = {str(name): position for position, name in enumerate(queries["id"])}
    found = sorted(relevant, key=lambda query: (order.get(str(query), len(order)), str(query)))
    judged = {
        str(query): {str(name): (float(score), 0) for name, score in relevant[query].items()}
        for query in found
    }
    records = (_dataset_records(data[name], f"{place}: {name}") for name in ("queries", "corpus"))
    yield from _judged_rows(judged, *records, place, bad)


def read_mteb_corpus(
    task_name: str, split: str = "train", subset: str | None = None, bad: BadRows | None = None
) -> Iterator[Row]:
    """Read all passages of an mteb task, judged or not."""
    place, data = load_split(task_name, split, subset)
    yield from _passage_rows(_dataset_records(data["corpus"], f"{place}: corpus"), bad or BadRows())


def mteb_fingerprint(task_name: str, split: str = "train", subset: str | None = None) -> str:
    """What the rows of an mteb task are known by; needs no network.

    It holds the version of mteb too, whose code reads the rows.
    """
    with random_state_kept():
        import mteb

        task, subset = find_task(task_name, split, subset)
    dataset = sorted((key, str(value)) for key, value in task.metadata.dataset.items())
    return f"{task.metadata.name} {dataset} {subset} {split} mteb {mteb.__version__}"


def read_qrels(path: Path, bad: BadRows) -> Judged:
    """Score and line of each judged passage, by query."""
    judged: Judged = {}
    for line, content in read_lines(path, bad):
        cells = content.rstrip("\r\n").split("\t")
        if not content.strip() or (line == 1 and tuple(cells) == HEADER):
            continue
        with bad.guard():
            _add_judgement(judged, cells, path, line)
    return judged


def _add_judgement(judged: Judged, cells: list[str], path: Path, line: int) -> None:
    if len(cells) != len(HEADER):
        raise ValueError(
            f"{path}:{line}: has {len(cells)} columns, expected {', '.join(HEADER)}, separated by "
            f"tabs. To fix, correct or remove the line."
        )
    query, document, text = cells
    try:
        score = float(int(text))
    except (ValueError, OverflowError):
        raise ValueError(
            f"{path}:{line}: score '{text}' is not a whole number. To fix, correct or remove the "
            f"line."
        ) from None
    before, first = judged.setdefault(query, {}).setdefault(document, (score, line))
    if before != score:
        raise ValueError(
            f"{path}:{line}: query-id '{query}' and corpus-id '{document}' have score {score:g}, "
            f"but {before:g} in line {first}. To fix, remove one of the lines."
        )


def json_records(path: Path, bad: BadRows) -> Iterator[Record]:
    """Lines of a file of texts, each with its place."""
    found = False
    for line, content in read_lines(path, bad):
        if not content.strip():
            continue
        found, where = True, f"{path}:{line}"
        row = bad.attempt(parse_row, content, where, ("_id", "text"))
        if row is not None:
            yield where, row
    if not found:
        raise ValueError(f"{path}: holds no rows. To fix, choose another file.")


def _dataset_records(dataset: Any, place: str) -> Iterator[Record]:
    """Rows of a ``datasets.Dataset`` as those of a file in BEIR layout."""
    columns = [c for c in ("id", "title", "text", "instruction") if c in dataset.column_names]
    rows = dataset.select_columns(columns).rename_column("id", "_id")
    for index, row in enumerate(rows):
        yield f"{place} row {index}", row


def passage_text(row: Mapping[str, Any], where: str) -> str:
    """Title and text of a passage, as mteb joins them to embed it."""
    parts = (row.get("title") or "", row.get("text"))
    whole = " ".join(parts).strip() if all(isinstance(part, str) for part in parts) else None
    return check_text(whole, f"{where}: text")


def query_text(row: Mapping[str, Any], where: str) -> str:
    """A query, followed by its instruction if it has one, as mteb writes it."""
    text = check_text(row.get("text"), f"{where}: text")
    if instruction := row.get("instruction"):  # written after the query, as mteb does
        return f"{text} {check_text(instruction, f'{where}: instruction')}"
    return text


def _read_texts(
    records: Iterable[Record],
    wanted: set[str],
    text_of: Callable[[Mapping[str, Any], str], str],
    bad: BadRows,
) -> dict[str, str]:
    """Texts of the wanted ids; the rest of a large corpus is not kept."""
    texts: dict[str, str] = {}
    places: dict[str, str] = {}
    for where, row in records:
        name = str(row["_id"])
        if name not in wanted:
            continue
        with bad.guard():
            text = text_of(row, where)
            if texts.setdefault(name, text) != text:
                raise ValueError(
                    f"{where}: _id '{name}' has another text than at {places[name]}. To fix, "
                    f"remove one of the lines."
                )
            places.setdefault(name, where)
    return texts


def _passage_rows(records: Iterable[Record], bad: BadRows) -> Iterator[Row]:
    for where, record in records:
        text = bad.attempt(passage_text, record, where)
        if text is not None:
            yield Row(text)


def _judged_rows(
    judged: Judged, queries: Iterable[Record], corpus: Iterable[Record], place: str, bad: BadRows
) -> Iterator[Row]:
    """A row for each judged query that has a positive, see :func:`read_beir`."""
    texts = _read_texts(queries, set(judged), query_text, bad)
    wanted = {name for pairs in judged.values() for name in pairs}
    passages = _read_texts(corpus, wanted, passage_text, bad)
    rows, without = 0, 0
    for query, pairs in judged.items():
        row = bad.attempt(_join, query, pairs, texts, passages, place, bad)
        if row is not None and row.positives:
            rows += 1
            yield row
        elif row is not None:
            without += 1
    if without:
        log.info("%s: %d of %d queries have no positive", place, without, len(judged))
    if not rows:
        raise ValueError(f"{place}: no query has a positive. To fix, choose another split.")


def _join(
    query: str,
    pairs: Mapping[str, tuple[float, int]],
    texts: Mapping[str, str],
    passages: Mapping[str, str],
    place: str,
    bad: BadRows,
) -> Row:
    """Row of a query, without the judgements of passages that are not there."""
    lines = {name: f"{place}:{line}" if line else place for name, (_, line) in pairs.items()}
    where = next(iter(lines.values()), place)
    text = _look_up(texts, query, f"{where}: query-id", "queries")
    pos, neg = [], []
    for name, (score, _) in pairs.items():
        with bad.guard():
            passage = _look_up(passages, name, f"{lines[name]}: corpus-id", "corpus")
            (pos if score > 0 else neg).append(passage)
    if not pos and any(score > 0 for score, _ in pairs.values()):
        raise ValueError(
            f"{where}: query-id '{query}' has no positive left. To fix, correct the lines of its "
            f"positives."
        )
    return Row(text, (*pos, *neg), len(pos))


def _look_up(texts: Mapping[str, str], name: str, what: str, table: str) -> str:
    if name not in texts:
        raise ValueError(
            f"{what} '{name}' is not in the {table}. To fix, use the files of one collection, or "
            f"remove the judgement."
        )
    return texts[name]
