"""Training rows from a retrieval collection in BEIR layout: its judged queries.

``corpus.jsonl`` (``_id``, ``title``, ``text``), ``queries.jsonl`` (``_id``, ``text``) and
``qrels/<split>.tsv`` (header, then query id, corpus id, score). A passage judged above 0 is a
positive of its query, one judged 0 a given negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bge_pruning.datasets.rows import Row as ContrastiveRow
from bge_pruning.datasets.text_files import parse_row, read_lines

HEADER = ("query-id", "corpus-id", "score")


def read_beir(folder: str | Path, split: str = "train") -> Iterator[ContrastiveRow]:
    """Read the judged queries of a split.

    Args:
        folder: Collection in BEIR layout.
        split: Name of the judgements.

    Yields:
        A row for each query that has a positive, in the order of the judgements.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is wrong or an id is unknown; the message names file and line.
    """
    folder = Path(folder)
    qrels = folder / "qrels" / f"{split}.tsv"
    judged = _read_qrels(qrels)
    queries = _read_texts(folder / "queries.jsonl", set(judged))
    wanted = {document for pairs in judged.values() for document in pairs}
    corpus = _read_texts(folder / "corpus.jsonl", wanted)
    found = False
    for query, pairs in judged.items():
        where = f"{qrels}:{next(iter(pairs.values()))[1]}"
        if query not in queries:
            raise ValueError(
                f"{where}: query-id '{query}' is not in queries.jsonl. To fix, use the files of "
                f"one collection."
            )
        for document, (_, line) in pairs.items():
            if document not in corpus:
                raise ValueError(
                    f"{qrels}:{line}: corpus-id '{document}' is not in corpus.jsonl. To fix, use "
                    f"the files of one collection."
                )
        pos = [corpus[document] for document, (score, _) in pairs.items() if score > 0]
        neg = [corpus[document] for document, (score, _) in pairs.items() if score <= 0]
        if pos:
            found = True
            yield ContrastiveRow(queries[query], pos, neg)
    if not found:
        raise ValueError(f"{qrels}: no query has a positive. To fix, choose another split.")


def _read_qrels(path: Path) -> dict[str, dict[str, tuple[float, int]]]:
    """Score and line of each judged passage, by query."""
    judged: dict[str, dict[str, tuple[float, int]]] = {}
    for line, content in read_lines(path):
        cells = content.rstrip("\r\n").split("\t")
        if line == 1 and tuple(cells) == HEADER:
            continue
        if not content.strip():
            continue
        if len(cells) != len(HEADER):
            raise ValueError(
                f"{path}:{line}: has {len(cells)} columns, expected {', '.join(HEADER)}, separated "
                f"by tabs. To fix, correct or remove the line."
            )
        judged.setdefault(cells[0], {})[cells[1]] = (_score(cells[2], f"{path}:{line}"), line)
    return judged


def _score(text: str, where: str) -> float:
    try:
        return float(int(text))
    except ValueError:
        raise ValueError(
            f"{where}: score '{text}' is not a whole number. To fix, correct or remove the line."
        ) from None


def _read_texts(path: Path, wanted: set[str]) -> dict[str, str]:
    """Title and text of the wanted ids; the rest of a large corpus is not kept."""
    texts: dict[str, str] = {}
    for line, content in read_lines(path):
        if not content.strip():
            continue
        row = parse_row(content, f"{path}:{line}", ("_id", "text"))
        name, text = str(row["_id"]), row["text"]
        whole = f"{row.get('title') or ''} {text}".strip()
        if name in wanted:
            if not isinstance(text, str) or not whole:
                raise ValueError(f"{path}:{line}: text is empty. To fix, correct the line.")
            texts[name] = whole
    return texts


def read_corpus(*a): ...
def read_mteb(*a): ...
def read_mteb_corpus(*a): ...
def mteb_fingerprint(*a): ...
