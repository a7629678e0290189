"""Training rows from retrieval collections: their judged queries.

A collection is a folder in BEIR layout: ``corpus.jsonl`` (``_id``, ``title``, ``text``),
``queries.jsonl`` (``_id``, ``text``) and ``qrels/<split>.tsv`` (header, then query id, corpus id,
score); or a retrieval task that ``mteb`` knows by name. A passage judged above 0 is a positive of
its query, one judged 0 a given negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_pruning.datasets.rows import BadRows, Row
from bge_pruning.datasets.text_files import check_text, parse_row, read_lines

HEADER = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class Judgement:
    """What a passage is to a query.

    Attributes:
        score: Above 0 if it is relevant.
        where: File and line, for messages.
    """

    score: float
    where: str


Judgements = dict[str, dict[str, Judgement]]


def read_beir(
    folder: str | Path, split: str = "train", bad: BadRows | None = None
) -> Iterator[Row]:
    """Read the judged queries of a split.

    Args:
        folder: Collection in BEIR layout.
        split: Name of the judgements.
        bad: What to do with lines that are wrong.

    Yields:
        A row for each query that has a positive, in the order of the judgements.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is wrong or an id is unknown; the message names file and line.
    """
    folder, bad = Path(folder), bad or BadRows()
    judged = _read_qrels(folder / "qrels" / f"{split}.tsv", bad)
    queries = dict(_read_texts(folder / "queries.jsonl", bad, set(judged)))
    wanted = {document for pairs in judged.values() for document in pairs}
    corpus = dict(_read_texts(folder / "corpus.jsonl", bad, wanted))
    yield from judged_rows(judged, queries, corpus, bad)


def read_corpus(folder: str | Path, bad: BadRows | None = None) -> Iterator[Row]:
    """Read every passage of a collection, judged or not.

    Args:
        folder: Collection in BEIR layout.
        bad: What to do with lines that are wrong.

    Yields:
        A row for each passage, in the order of the file.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If a line is wrong; the message names file and line.
    """
    for _, text in _read_texts(Path(folder) / "corpus.jsonl", bad or BadRows(), None):
        yield Row(text)


def judged_rows(
    judged: Judgements, queries: dict[str, str], corpus: dict[str, str], bad: BadRows
) -> Iterator[Row]:
    """Rows of judged queries.

    Args:
        judged: The judgements of each query.
        queries: Text of each query.
        corpus: Text of each passage.
        bad: What to do with unknown ids.

    Yields:
        A row for each query that has a positive, in order.
    """
    for query, pairs in judged.items():
        row = None
        with bad.guard():
            row = _judged_row(query, pairs, queries, corpus)
        if row is not None:
            yield row


def _judged_row(
    query: str, pairs: dict[str, Judgement], queries: dict[str, str], corpus: dict[str, str]
) -> Row | None:
    """The row of a query, ``None`` if it has no positive."""
    if query not in queries:
        raise ValueError(
            f"{next(iter(pairs.values())).where}: query-id '{query}' is not among the queries. To "
            f"fix, use the files of one collection."
        )
    for document, judgement in pairs.items():
        if document not in corpus:
            raise ValueError(
                f"{judgement.where}: corpus-id '{document}' is not in the corpus. To fix, use the "
                f"files of one collection."
            )
    pos = [corpus[document] for document, judgement in pairs.items() if judgement.score > 0]
    neg = [corpus[document] for document, judgement in pairs.items() if judgement.score <= 0]
    return Row(queries[query], (*pos, *neg), len(pos)) if pos else None


def _read_qrels(path: Path, bad: BadRows) -> Judgements:
    """The judgements of each query."""
    judged: Judgements = {}
    for line, content in read_lines(path, bad):
        cells = content.rstrip("\r\n").split("\t")
        if not content.strip() or (line == 1 and tuple(cells) == HEADER):
            continue
        with bad.guard():
            query, document, judgement = _parse_judgement(cells, f"{path}:{line}")
            earlier = judged.setdefault(query, {}).setdefault(document, judgement)
            if earlier.score != judgement.score:
                raise ValueError(
                    f"{path}:{line}: judges corpus-id '{document}' otherwise than "
                    f"{earlier.where}. To fix, remove one of the two lines."
                )
    return judged


def _parse_judgement(cells: list[str], where: str) -> tuple[str, str, Judgement]:
    if len(cells) != len(HEADER):
        raise ValueError(
            f"{where}: has {len(cells)} columns, expected {', '.join(HEADER)}, separated "
            f"by tabs. To fix, correct or remove the line."
        )
    try:
        score = int(cells[2])
    except ValueError:
        raise ValueError(
            f"{where}: score '{cells[2]}' is not a whole number. To fix, correct or remove the "
            f"line."
        ) from None
    return cells[0], cells[1], Judgement(score, where)


def _read_texts(path: Path, bad: BadRows, wanted: set[str] | None) -> Iterator[tuple[str, str]]:
    """Id and text, with its title in front, of the wanted lines or of all."""
    # Of a large corpus no text is kept to compare, only its hash.
    seen: dict[str, int] = {}
    for line, content in read_lines(path, bad):
        if not content.strip():
            continue
        with bad.guard():
            name, text = _parse_text(content, f"{path}:{line}")
            if seen.setdefault(name, hash(text)) != hash(text):
                raise ValueError(
                    f"{path}:{line}: _id '{name}' has another text in an earlier line. To fix, "
                    f"remove one of the two."
                )
            if wanted is not None and name not in wanted:
                continue
            yield name, text


def _parse_text(content: str, where: str) -> tuple[str, str]:
    row = parse_row(content, where, ("_id", "text"))
    return str(row["_id"]), join_title(row, where)


def join_title(row: dict[str, Any], where: str) -> str:
    """Title and text as ``mteb`` joins them to embed a passage.

    Raises:
        ValueError: If there is no text.
    """
    title, text = row.get("title") or "", row["text"]
    if not isinstance(text, str) or not isinstance(title, str):
        raise ValueError(f"{where}: text or title is no text. To fix, correct the line.")
    return check_text(f"{title} {text}".strip(), f"{where}: text")
