"""Training rows from retrieval collections: the judged queries, and all passages to mine among.

A collection is a folder in BEIR layout, with ``corpus.jsonl`` (``_id``, ``title``, ``text``),
``queries.jsonl`` (``_id``, ``text``) and ``qrels/<split>.tsv`` (header, then query id, corpus id,
score), each perhaps with ``.gz``, or a task that ``mteb`` knows by name. A passage judged above 0
is a positive of its query, any other judged one a given negative. A passage reads as BEIR and mteb
embed it: title, space, text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bge_pruning.datasets.mteb_tasks import data_of, find_task, load_split, random_state_kept
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

    A row without positives holds a query and the passage that is the query itself. Wrong lines are
    ``bad``; judgements of unknown ids are noted there, see :func:`note_unknown`.

    Raises:
        ValueError: If a line is wrong; the message names file and line. If a file holds no rows, or
            no query a positive.
    """
    bad = bad or BadRows()
    corpus, queries, qrels = collection_files(folder, split)
    texts = (json_records(path, bad) for path in (queries, corpus))
    yield from _judged_rows(read_qrels(qrels, bad), *texts, str(qrels), bad)


def read_corpus(folder: str | Path, bad: BadRows | None = None) -> Iterator[Row]:
    """Read all passages of a folder in BEIR layout, judged or not."""
    bad = bad or BadRows()
    yield from _passage_rows(json_records(collection_files(folder, "")[0], bad), bad)


def collection_files(folder: str | Path, split: str) -> tuple[Path, Path, Path]:
    """Corpus, queries and judgements of a folder in BEIR layout; each may be ``.gz``."""
    names = ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")
    plain = [Path(folder) / name for name in names]
    packed = [path.with_name(f"{path.name}.gz") for path in plain]
    both = zip(plain, packed, strict=True)
    corpus, queries, qrels = (b if b.exists() and not a.exists() else a for a, b in both)
    return corpus, queries, qrels


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
    place, task = load_split(task_name, split, subset)
    data = data_of(task, split)
    queries, relevant = data["queries"], data["relevant_docs"]
    # mteb groups the judgements by query in an order that changes from run to run.
    order = {str(name): position for position, name in enumerate(queries["id"])}
    found = sorted(relevant, key=lambda query: (order.get(str(query), len(order)), str(query)))
    judged = {
        str(query): {str(name): (float(score), 0) for name, score in relevant[query].items()}
        for query in found
    }
    records = (_dataset_records(data[name], f"{place}: {name}") for name in ("queries", "corpus"))
    yield from _judged_rows(judged, *records, place, bad, task.ignore_identical_ids)


def read_mteb_corpus(
    task_name: str, split: str = "train", subset: str | None = None, bad: BadRows | None = None
) -> Iterator[Row]:
    """Read all passages of an mteb task, judged or not."""
    place, task = load_split(task_name, split, subset)
    corpus = data_of(task, split)["corpus"]
    yield from _passage_rows(_dataset_records(corpus, f"{place}: corpus"), bad or BadRows())


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


def passage_text(row: Mapping[str, Any], where: str, empty: bool = False) -> str:
    """Title and text of a passage, as mteb joins them to embed it; nothing only if ``empty``."""
    parts = (row.get("title") or "", row.get("text"))
    whole = " ".join(parts).strip() if all(isinstance(part, str) for part in parts) else None
    return "" if empty and whole == "" else check_text(whole, f"{where}: text")


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
    judged: Judged,
    queries: Iterable[Record],
    corpus: Iterable[Record],
    place: str,
    bad: BadRows,
    own: bool | None = None,
) -> Iterator[Row]:
    """A row for each judged query that has a positive, see :func:`read_beir`.

    After them comes a row without positives for each query that is a passage too.
    """
    texts = _read_texts(queries, set(judged), query_text, bad)
    wanted = {name for pairs in judged.values() for name in pairs} | set(judged)
    passages = _read_texts(corpus, wanted, passage_text, bad)
    note_unknown(judged, texts, passages, place, bad)
    there = {query: pairs for query, pairs in judged.items() if query in texts}
    rows = 0
    for query, pairs in there.items():
        row = _join(texts[query], pairs, passages)
        if row.positives:
            rows += 1
            yield row
    if rows < len(there):
        log.info("%s: %d of %d queries have no positive", place, len(there) - rows, len(there))
    if not rows:
        raise ValueError(
            f"{place}: no query has a positive that is there. To fix, choose another split, or use "
            f"the files of one collection."
        )
    if note_own(own, there, texts, passages, place, bad):
        yield from (Row(texts[name], (passages[name],)) for name in there if name in passages)


def _join(text: str, pairs: Mapping[str, tuple[float, int]], passages: Mapping[str, str]) -> Row:
    """Row of a query: each different text once, of the passages that are there."""
    scores = {name: score for name, (score, _) in pairs.items() if name in passages}
    pos = dict.fromkeys(passages[name] for name, score in scores.items() if score > 0)
    neg = dict.fromkeys(passages[name] for name, score in scores.items() if score <= 0)
    return Row(text, (*pos, *(other for other in neg if other not in pos)), len(pos))


def note_unknown(
    judged: Judged, queries: Container[str], passages: Container[str], place: str, bad: BadRows
) -> None:
    """Note judgements of queries or passages that are not there, which published sets have.

    As in mteb, such a query does not count, and such a passage counts as one that is not found.
    """
    total = sum(map(len, judged.values()))
    for kind, known in (("query", queries), ("corpus", passages)):
        lost = [
            (name, line)
            for query, pairs in judged.items()
            for passage, (_, line) in pairs.items()
            if (name := query if kind == "query" else passage) not in known
        ]
        if lost:
            (name, line), file = lost[0], {"query": "queries", "corpus": "corpus"}[kind]
            at = f" in line {line}" if line else ""
            bad.notes.append(
                f"{place}: {len(lost):,} of {total:,} judgements have a {kind}-id that is not in "
                f"the {file}, such as '{name}'{at}"
            )


def note_own(
    own: bool | None,
    judged: Judged,
    queries: Mapping[str, str],
    passages: Mapping[str, str],
    place: str,
    bad: BadRows,
) -> bool:
    """Find out, and note, whether a passage of a query's id is the query itself.

    In ArguAna and Quora it is; mteb ignores it, by a mark of the task. In a folder, which has no
    mark, it is if most such passages hold the text of the query and none of them is judged relevant
    to it: numbers may be ids of both by chance.

    Args:
        own: The mark, ``None`` if there is none.
    """
    both = [name for name in judged if name in queries and name in passages]
    if own is None:
        hold = sum(queries[name] in passages[name] for name in both)
        relevant = any(judged[name].get(name, (0, 0))[0] > 0 for name in both)
        own = not relevant and 2 * hold > len(both)
    if own and both:
        bad.notes.append(
            f"{place}: {len(both):,} of {len(judged):,} queries are passages too, of the same id, "
            f"which are neither found nor a negative of theirs, as in mteb"
        )
    return own
