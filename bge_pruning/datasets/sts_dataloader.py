"""Read sentence pairs with gold scores, and plain sentences.

Pairs: columns ``sentence1, sentence2, score`` of a CSV or TSV file (with or without a header), of
JSON lines, or of a Hugging Face dataset. Plain sentences: a text file with one a line, or the texts
of such a table. They may be articles, which are cut into passages at the ends of sentences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_pruning.config.data_parts import PassagesConfig
from bge_pruning.config.names import SOURCE_COLUMNS
from bge_pruning.datasets.embedding_dataset import build_tokenizer
from bge_pruning.datasets.rows import BadRows, Row
from bge_pruning.datasets.tables import Table, read_table, table_paths
from bge_pruning.datasets.text_files import check_text, choose_lines, read_lines, text_key

if TYPE_CHECKING:
    from tokenizers import Tokenizer

COLUMNS = SOURCE_COLUMNS["sts"]
TITLE = "title"
# Columns that hold texts, in any kind of table.
TEXT_COLUMNS = tuple(name for name in SOURCE_COLUMNS["sentences"] if name != TITLE)
SCORE_RANGE = (0.0, 5.0)


# The passages of an article, of its title (which may be empty) and its text.
Cut = Callable[[str, str], list[str]]
# What may close a sentence after its mark. A mark of these scripts needs no space behind it, one of
# the others does ("3.5"); a letter or digit that stands alone before a full stop is an abbreviation
# or a number ("z. B.", "3. Mai"). Thai has no marks: its sentences end at line breaks.
CLOSING = "[\"'”’»›)\\]」』）】》]*"
SENTENCE_END = re.compile(
    rf"(?:[。！？｡]+{CLOSING}|(?:(?<![\s.(]\w)\.|[!?…؟۔।॥።፧])+{CLOSING}(?=\s)|\n)\s*"
)


@dataclass(frozen=True)
class STSPairs:
    """Sentence pairs with gold similarity in [0, 5], three lists of the same length."""

    sentences1: list[str]
    sentences2: list[str]
    scores: list[float]

    def __len__(self) -> int:
        return len(self.scores)


def read_sts(path: str | Path) -> STSPairs:
    """Read scored sentence pairs into memory."""
    pairs = STSPairs([], [], [])
    for row in read_pairs(Table(str(path))):
        pairs.sentences1.append(row.text)
        pairs.sentences2.extend(row.others)
        pairs.scores.extend(row.scores)
    if not pairs.scores:
        raise ValueError(f"{path}: holds no sentence pairs. To fix, choose another file.")
    return pairs


def read_pairs(
    table: Table, score_range: tuple[float, float] = SCORE_RANGE, bad: BadRows | None = None
) -> Iterator[Row]:
    """Read scored sentence pairs row by row."""
    bad = bad or BadRows()
    for where, cells in read_table(table, COLUMNS, bad, headerless=COLUMNS):
        row = bad.attempt(_parse_pair, cells, where, score_range)
        if row is not None:
            yield row


def _parse_pair(cells: Mapping[str, Any], where: str, score_range: tuple[float, float]) -> Row:
    first, second = (check_text(cells[n], f"{where}: {n}") for n in COLUMNS[:2])
    return Row(first, (second,), scores=(_parse_score(cells["score"], where, score_range),))


def _parse_score(value: Any, where: str, score_range: tuple[float, float]) -> float:
    low, high = score_range
    try:
        score = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = float("nan")
    if not low <= score <= high:
        raise ValueError(
            f"{where}: score '{str(value)[:40]}' is not a number in [{low:g}, {high:g}]. To fix, "
            f"correct or remove the line, or declare score_range for the source."
        )
    return score


def read_sentences(
    table: Table,
    bad: BadRows | None = None,
    lines: str | None = None,
    cut: Cut | None = None,
) -> Iterator[Row]:
    """Read sentences without labels.

    A ``.txt`` file (plain or ``.gz``) has one sentence a line, of which empty ones are skipped; of
    a table every column in ``TEXT_COLUMNS`` is read.

    Args:
        lines: Which lines of a text file, see :func:`choose_lines`.
        cut: Cuts each text, with the title of its row, into the texts to read.

    Raises:
        ValueError: If a row is invalid, or lines are chosen that are not there or of a table.
    """
    bad = bad or BadRows()
    if not table.on_hub and table.path.endswith((".txt", ".txt.gz")):
        yield from _text_lines(Path(table.path), bad, lines, cut)
    elif lines is not None:
        raise ValueError(
            f"{table.path}: lines '{lines}' can be chosen of a .txt file alone. To fix, leave lines"
            f" out, or cut the data."
        )
    else:
        yield from _table_texts(table, bad, cut)


def read_texts(files: Sequence[str], limit: int | None = None) -> list[str]:
    """Read the different texts of some files or patterns; at most ``limit``, spread evenly.

    Raises:
        ValueError: If a file holds no text, or a row is invalid.
    """
    found: dict[str, None] = {}
    for path in (path for file in files for path in table_paths(file)):
        rows = dict.fromkeys(row.text for row in read_sentences(Table(path)))
        if not rows:
            raise ValueError(f"{path}: holds no text. To fix, choose another file.")
        found |= rows
    texts = list(found)
    if limit is None or len(texts) <= limit:
        return texts
    return [texts[i * len(texts) // limit] for i in range(limit)]


def _text_lines(path: Path, bad: BadRows, lines: str | None, cut: Cut | None) -> Iterator[Row]:
    chosen = None if lines is None else choose_lines(path, lines)[0]
    for _, content in read_lines(path, bad, chosen=chosen):
        if text := content.strip():
            yield from map(Row, cut("", text) if cut else (text,))


def _table_texts(table: Table, bad: BadRows, cut: Cut | None) -> Iterator[Row]:
    optional = TEXT_COLUMNS if cut is None else (*TEXT_COLUMNS, TITLE)
    # Without a header, a CSV file is one of scored pairs.
    for where, cells in read_table(table, (), bad, optional=optional, headerless=COLUMNS):
        yield from map(Row, bad.attempt(_texts_of, cells, where, cut) or ())


def _texts_of(cells: Mapping[str, Any], where: str, cut: Cut | None) -> list[str]:
    texts = []
    for name in (name for name in TEXT_COLUMNS if name in cells):
        values = cells[name] if isinstance(cells[name], list) else [cells[name]]
        texts += [check_text(value, f"{where}: {name}") for value in values]
    if not texts:
        raise ValueError(
            f"{where}: has none of {', '.join(TEXT_COLUMNS)}. To fix, say under columns of the "
            f"source how its text is called."
        )
    if cut is None:
        return texts
    title = cells.get(TITLE) or ""
    title = check_text(title, f"{where}: {TITLE}").strip() if str(title).strip() else ""
    return [passage for text in texts for passage in cut(title, text)]


def build_cutter(
    passages: PassagesConfig, tokenizer_json: bytes, max_length: int, prompt: str = ""
) -> Cut:
    """The function that cuts articles into passages, see :func:`cut_article`.

    Which articles get long passages follows from their texts alone.

    Args:
        max_length: Most tokens that the model reads.
        prompt: What each passage will have before it.

    Raises:
        ValueError: If passages are longer than the model can read.
    """
    longest = max(passages.max_tokens, passages.long_max_tokens if passages.long_share else 0)
    if longest > max_length:
        raise ValueError(
            f"passages have up to {longest} tokens, and the model reads {max_length}. To fix, "
            f"write smaller numbers under passages of the source."
        )
    tokenizer = build_tokenizer(tokenizer_json, max_length)
    tokenizer.no_truncation()

    def cut(title: str, text: str) -> list[str]:
        is_long = text_key(text) < passages.long_share * 2**64
        most = passages.long_max_tokens if is_long else passages.max_tokens
        return cut_article(tokenizer, title, text, (passages.min_tokens, most), prompt)

    return cut


def cut_article(
    tokenizer: Tokenizer, title: str, text: str, limits: tuple[int, int], prompt: str = ""
) -> list[str]:
    """Cut an article into passages of whole sentences, as long as may be, each after the title.

    A sentence that is longer is cut where the limit falls. A passage that is too short is left out,
    which may be the last one. A title that would take more than half of a passage is left out.

    Args:
        limits: Fewest and most tokens of a passage: special tokens, prompt and title included.
    """
    fewest, most = limits
    head = f"{title} " if title else ""
    around = len(tokenizer.encode(prompt + head).ids)
    if around > most // 2:
        head, around = "", len(tokenizer.encode(prompt).ids)
    room = max(most - around, 1)
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    bounds = pairwise(sorted({0, *ends, len(text)}))
    sentences = [text[start:end] for start, end in bounds]
    encodings = tokenizer.encode_batch(sentences, add_special_tokens=False)
    passages, parts, size = [], [], 0
    for sentence, encoding in zip(sentences, encodings, strict=True):
        for part, tokens in _within(sentence, encoding.offsets, room):
            if size + tokens > room:
                passages.append((parts, size))
                parts, size = [], 0
            parts.append(part)
            size += tokens
    passages.append((parts, size))
    kept = ("".join(parts).strip() for parts, size in passages if around + size >= fewest)
    return [head + passage for passage in kept if passage]


def _within(
    sentence: str, offsets: Sequence[tuple[int, int]], room: int
) -> Iterator[tuple[str, int]]:
    """Parts of a sentence with at most so many tokens, and their numbers of tokens."""
    starts = [0, *(offsets[token][0] for token in range(room, len(offsets), room)), len(sentence)]
    for number, (start, end) in enumerate(pairwise(starts)):
        yield sentence[start:end], min(room, len(offsets) - number * room)
