"""Line-parallel files: line ``n`` is the same sentence in the file of each language.

A path holds ``{language}``, and languages are given alone (``de``) or as pairs (``de-en``), whose
first language asks and whose second one answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from bge_pruning.config.names import LANGUAGE
from bge_pruning.datasets.retrieval_collection import RetrievalCollection
from bge_pruning.datasets.rows import BadRows, Row
from bge_pruning.datasets.text_files import check_file, check_unicode, choose_lines, read_lines

FIX = f"write {LANGUAGE} for the language in the path, as in texts-{LANGUAGE}.txt"


@dataclass(frozen=True)
class ParallelTexts:
    """Some lines of line-parallel files.

    Attributes:
        path: Of a file, with ``{language}`` in it.
        pairs: Languages of queries and of their answers.
        lines: Which lines, see :func:`choose_lines`; ``None`` for all.
    """

    path: str
    pairs: tuple[tuple[str, str], ...]
    lines: str | None = None

    @property
    def files(self) -> dict[str, Path]:
        """The file of each language."""
        languages = dict.fromkeys(language for pair in self.pairs for language in pair)
        return {language: _file(self.path, language) for language in languages}


def find_parallel(path: str, names: Sequence[str], lines: str | None = None) -> ParallelTexts:
    """Find the files of some languages, or of pairs such as ``de-en``.

    The first of two languages asks and the second one answers; of more, each asks all others. A
    name is a language if there is a file of it, as ``zh-TW`` may be.

    Raises:
        FileNotFoundError: If a language has no file.
        ValueError: If the path has no place for a language, or the names make no different pairs.
    """
    if LANGUAGE not in path:
        raise ValueError(f"{path}: has no {LANGUAGE}. To fix, {FIX}.")
    alone = [name for name in names if "-" not in name or _file(path, name).is_file()]
    if alone and len(alone) < len(names):
        raise ValueError(
            f"{path}: languages {', '.join(names)} mix languages with pairs. To fix, give languages"
            f" alone, or pairs such as {alone[0]}-en alone."
        )
    if alone:
        pairs = [(names[0], names[1])] if len(names) == 2 else [*permutations(names, 2)]
    else:
        pairs = [_split_pair(path, name) for name in names]
    if not pairs or len(set(pairs)) < len(pairs) or any(len(set(pair)) < 2 for pair in pairs):
        raise ValueError(
            f"{path}: languages {', '.join(names)} are not two or more different ones, or different"
            f" pairs of two. To fix, write e.g. de-en."
        )
    found = ParallelTexts(path, tuple(pairs), lines)
    for file in found.files.values():
        check_file(file)
    return found


def _file(path: str, language: str) -> Path:
    return Path(path.replace(LANGUAGE, language))


def _split_pair(path: str, name: str) -> tuple[str, str]:
    """Two languages with a ``-`` between them; where they have one too, the files tell."""
    parts = name.split("-")
    splits = [("-".join(parts[:n]), "-".join(parts[n:])) for n in range(1, len(parts))]
    there = [pair for pair in splits if all(_file(path, part).is_file() for part in pair)]
    return (there or splits)[0]


def read_parallel(texts: ParallelTexts, bad: BadRows | None = None) -> Iterator[Row]:
    """Read rows to train on: each line in each language that asks, with its translations.

    A row's positives are the lines of the languages that answer it. Those of other languages that
    answer are no positives, and in rows of their own, without any, so that none is a negative.

    Raises:
        ValueError: If the files have different numbers of lines, or a line is wrong.
    """
    answers: dict[str, list[str]] = {}
    for query, passage in texts.pairs:
        answers.setdefault(query, []).append(passage)
    passages = dict.fromkeys(passage for _, passage in texts.pairs)
    for _, line in read_aligned(texts, bad or BadRows()):
        for query, languages in answers.items():
            positives = dict.fromkeys(line[language] for language in languages)
            yield Row(line[query], (*positives,), len(positives))
            others = dict.fromkeys(line[language] for language in passages if language != query)
            yield from (Row(line[query], (text,)) for text in others if text not in positives)


def read_aligned(texts: ParallelTexts, bad: BadRows) -> Iterator[tuple[int, dict[str, str]]]:
    """Read the lines, each with its number from 1 and its text in each language.

    Lines that are empty in every language are left out; one that is empty in some is invalid.
    """
    files = texts.files
    chosen = {name: choose_lines(file, texts.lines) for name, file in files.items()}
    _check_counts(files, chosen)
    columns = {
        name: read_lines(file, bad, "surrogateescape", chosen[name][0])
        for name, file in files.items()
    }
    for name, file in files.items():
        lines = read_lines(file, bad, "surrogateescape", chosen[name][0])
        if not any(text.strip() for _, text in lines):
            where = f" among lines {texts.lines}" if texts.lines else ""
            raise ValueError(
                f"{file}: holds no text{where}. To fix, leave {name} out, or choose others."
            )
    for row in zip(*columns.values(), strict=True):
        line = {name: text.strip() for name, (_, text) in zip(files, row, strict=True)}
        if any(line.values()) and bad.attempt(_check_line, line, files, row[0][0]):
            yield row[0][0], line


def _check_counts(files: dict[str, Path], chosen: dict[str, tuple[range, int]]) -> None:
    counts = {file: chosen[name][1] for name, file in files.items()}
    short, most = min(counts, key=counts.get), max(counts, key=counts.get)
    if counts[short] < counts[most]:
        raise ValueError(
            f"{short}:{counts[short]}: is the last line, and {most} has {counts[most]:,}: line n "
            f"must be the same sentence in both. To fix, use the files of one collection."
        )


def _check_line(line: dict[str, str], files: dict[str, Path], number: int) -> bool:
    for name, text in line.items():
        where = f"{files[name]}:{number}"
        if not text:
            other = next(files[name] for name, text in line.items() if text)
            raise ValueError(
                f"{where}: is empty, and {other.name} has a text there. To fix, write it, or "
                f"remove the line from all files."
            )
        check_unicode(text, where)
    return True


def parallel_collection(texts: ParallelTexts, bad: BadRows | None = None) -> RetrievalCollection:
    """Make a collection of one pair: the lines of its first language search those of its second.

    The ids are numbers of lines. Relevant are all lines with the text of a translation of the
    query, since several may have the same text.

    Raises:
        ValueError: If there are more pairs, no lines, or :func:`read_parallel` refuses them.
    """
    if len(texts.pairs) > 1:
        raise ValueError(
            f"{texts.path}: is searched for one pair of languages, not {len(texts.pairs)}. To fix, "
            f"name a source for each pair."
        )
    bad = bad or BadRows()
    (asking, answering), lines = texts.pairs[0], dict(read_aligned(texts, bad))
    if not lines:
        raise ValueError(f"{texts.path}: holds no lines to search. To fix, choose other lines.")
    ids: dict[str, list[str]] = {}
    answers: dict[str, set[str]] = {}
    for number, line in lines.items():
        ids.setdefault(line[answering], []).append(str(number))
        answers.setdefault(line[asking], set()).add(line[answering])
    bad.report("evaluation")
    corpus, queries = (
        [{"id": str(number), "title": "", "text": line[name]} for number, line in lines.items()]
        for name in (answering, asking)
    )
    relevant = {
        query["id"]: {i: 1 for text in sorted(answers[query["text"]]) for i in ids[text]}
        for query in queries
    }
    return RetrievalCollection(corpus, queries, relevant, own=False)
