"""The rows of a source as memory-mapped arrays: read, checked, numbered and tokenised once.

A source is read twice. The first pass checks every row, so that an error comes before any long
work, and numbers the texts by their hash; the second tokenises each different text. Neither keeps
the texts: what stays per row is a few numbers in arrays, whatever the number of rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from bge_pruning.datasets.embedding_dataset import TokenizedTexts, build_tokenizer, tokenize
from bge_pruning.datasets.rows import BadRows, Row, RowTable
from bge_pruning.datasets.text_files import compute_digest, text_key
from bge_pruning.utils.files import atomic_folder, lock_of
from bge_pruning.utils.json_records import Count, Flag, Record, Text, read_record

log = logging.getLogger(__name__)

ReadRows = Callable[[BadRows], Iterable[Row]]

RECORD = "corpus.json"
IDS = "ids.int32"  # raw, since its length is known only at the end
ROW_ARRAYS = ("texts", "starts", "positives", "scores")
ARRAYS = ("text_starts", "text_keys", *ROW_ARRAYS)
WORDS = "words"  # only where texts have the same words after other prompts
# Texts that are tokenised together.
CHUNK = 8192
# Raised when the layout of the folder or the meaning of a row changes.
FORMAT = 5


class _BadRecord(Record):
    skip: Flag
    count: Count
    examples: list[Text]
    notes: list[Text]


class _CorpusRecord(Record):
    format: Count
    truncated: Count
    bad: _BadRecord
    digests: dict[str, Text]


@dataclass(frozen=True)
class TextCorpus:
    """A source, tokenised.

    Attributes:
        keys: :func:`bge_pruning.datasets.text_files.text_key` of each text without its prompt,
            ``(texts,)``.
    """

    texts: TokenizedTexts
    rows: RowTable
    bad: BadRows
    keys: np.ndarray


def corpus_key(*parts: object) -> str:
    """Hash of everything that a cache depends on, which names it."""
    return hashlib.sha256(repr((FORMAT, parts)).encode()).hexdigest()[:24]


def cached_corpus(
    folder: Path, name: str, read: ReadRows, tokenizer_json: bytes, max_length: int, skip: bool
) -> TextCorpus:
    """A source from the cache, or read, twice, and kept there.

    The folder's name must hold :func:`corpus_key`. It is written as a whole or not at all, and by
    one process: others wait for it.

    Raises:
        ValueError: If a row is wrong, there is none, or the cache is damaged.
    """
    if not folder.is_dir():
        with lock_of(folder):
            if not folder.is_dir():
                with atomic_folder(folder, RECORD) as staging:
                    write_corpus(staging, name, read, tokenizer_json, max_length, skip)
    return load_corpus(folder)


def write_corpus(
    folder: Path, name: str, read: ReadRows, tokenizer_json: bytes, max_length: int, skip: bool
) -> None:
    """Read a source and write its arrays, see :func:`cached_corpus`."""
    started = time.monotonic()
    bad = BadRows(skip)
    rows = number_texts(read(bad))
    if not len(rows):
        raise ValueError(f"{name}: holds no rows. To fix, choose another file.")
    tokenizer = build_tokenizer(tokenizer_json, max_length)
    lengths, keys, truncated = array("i"), array("Q"), 0
    with (folder / IDS).open("wb") as file:
        for chunk in _chunks(_different_texts(read(BadRows(skip)), rows)):
            texts, words = zip(*chunk, strict=True)
            tokens = tokenize(texts, tokenizer)
            file.write(tokens.ids.tobytes())
            lengths.extend(tokens.lengths.tolist())
            keys.extend(map(text_key, words))
            truncated += tokens.truncated
    arrays = {
        "text_starts": _starts(np.array(lengths, np.int64)),
        "text_keys": np.array(keys, np.uint64),
        **{name: getattr(rows, name) for name in ROW_ARRAYS},
        **({} if rows.words is None else {WORDS: rows.words}),
    }
    for key, values in arrays.items():
        np.save(folder / f"{key}.npy", values)
    record = {
        "format": FORMAT,
        "source": name,
        "tokens": int(arrays["text_starts"][-1]),
        "truncated": truncated,
        "bad": asdict(bad),
        "digests": {path.name: _digest(path) for path in _array_files(folder, arrays)},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    log.info(
        "%s: %d rows with %d different texts tokenised in %.1f s",
        *(name, len(rows), len(lengths), time.monotonic() - started),
    )


def load_corpus(folder: Path) -> TextCorpus:
    """Map the arrays of a cache folder into memory."""
    record = read_record(folder / RECORD, _CorpusRecord, "delete the folder; it is made again")
    try:
        if record.format != FORMAT:
            raise ValueError(f"it is of version {record.format}, expected {FORMAT}")
        names = (*ARRAYS, WORDS) if f"{WORDS}.npy" in record.digests else ARRAYS
        found = {path.name: _digest(path) for path in _array_files(folder, names)}
        if wrong := [name for name, digest in found.items() if record.digests.get(name) != digest]:
            raise ValueError(f"{', '.join(wrong)}: the checksum is not that of the content")
        arrays = {
            key: np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False) for key in names
        }
        ids = np.memmap(folder / IDS, dtype=np.int32, mode="r")
        rows = RowTable(*(arrays[key] for key in ROW_ARRAYS), arrays.get(WORDS))
        texts = TokenizedTexts(ids, arrays["text_starts"], record.truncated)
        bad = BadRows(**record.bad.as_dict())
        return TextCorpus(texts, rows, bad, arrays["text_keys"])
    except (OSError, EOFError, LookupError, TypeError, ValueError, BadZipFile) as error:
        raise ValueError(
            f"{folder}: damaged or not complete ({error}). To fix, delete the folder; it is made "
            f"again."
        ) from error


def _array_files(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / IDS, *(folder / f"{key}.npy" for key in names)]


def _digest(path: Path) -> str:
    return compute_digest(path, path.stat().st_size).hex()


def number_texts(given: Iterable[Row]) -> RowTable:
    """Number the texts of rows, each different text once, in order of appearance."""
    digests, counts, positives, scores = bytearray(), array("q"), array("i"), array("f")
    words: bytearray | None = None
    for row in given:
        if words is None and row.texts != row.words:
            words = digests.copy()  # none of the rows so far has a prompt
        digests += _hashes(row.texts)
        if words is not None:
            words += _hashes(row.words)
        counts.append(1 + len(row.others))
        positives.append(row.positives)
        scores.append(float("nan"))
        scores.extend(row.scores or [float("nan")] * len(row.others))
    texts = _numbers(digests)
    # Texts that differ in more than their prompts have the same numbers with and without.
    same = words is None or np.array_equal(texts, numbers := _numbers(words))
    return RowTable(
        texts,
        _starts(np.array(counts, np.int64)),
        np.array(positives, np.int32),
        np.array(scores, np.float32),
        None if same else numbers[np.unique(texts, return_index=True)[1]],
    )


def _hashes(texts: Iterable[str]) -> bytes:
    # 128 bits: among 10^9 texts two hashes meet with a chance of 10^-21.
    return b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)


def _numbers(digests: bytearray) -> np.ndarray:
    """Number each different hash of 16 bytes, in order of appearance."""
    import pyarrow as pa

    kind, count = pa.binary(16), len(digests) // 16
    hashes = pa.Array.from_buffers(kind, count, [None, pa.py_buffer(digests)])
    return hashes.dictionary_encode().indices.to_numpy().astype(np.int64)


def _different_texts(given: Iterable[Row], rows: RowTable) -> Iterator[tuple[str, str]]:
    """Each different text once, with and without its prompt, in the order of its number."""
    place, expected = 0, 0
    for row in given:
        for pair in zip(row.texts, row.words, strict=True):
            if rows.texts[place] == expected:
                expected += 1
                yield pair
            place += 1


def _chunks(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    iterator = iter(texts)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
