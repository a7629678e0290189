"""The teacher's outputs of the texts that a run draws, kept on disk for the next run.

Below a folder, each output has files of its own: a list of pieces, one line each (``.jsonl``), the
numbers of their texts (``.texts``) and their values, one piece after the other (``.values``). A
piece counts once its line is written, so that a process which is killed loses one piece at most.
Each process writes files of its own and never changes those of another. Every line has a checksum:
a block of zeros after a crash would otherwise be trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from bge_pruning.datasets.embedding_dataset import TokenizedTexts, pad_texts
from bge_pruning.datasets.mixed_dataloader import BATCH_TOKENS, batch_indices
from bge_pruning.datasets.text_files import BLOCK, BLOCKS, DIGEST_BYTES
from bge_pruning.utils.files import lock_of
from bge_pruning.utils.json_records import Count, Record, Text, parse_json, parse_record

# Token ids and mask, shape ``(B, T)``, to outputs by name: ``dense_vecs`` ``(B, H)``,
# ``token_weights`` ``(B, T)``, ``colbert_vecs`` ``(B, T - 1, C)`` without CLS, ``last_states``
# ``(B, T, H)``.
Encode = Callable[[Tensor, Tensor], dict[str, Tensor]]
# Told after every batch how many tokens were embedded in it.
Report = Callable[[int], None]
BATCH_TEXTS = 256
# A piece is written when it is so large or took so long.
PIECE_BYTES = 1 << 28
PIECE_SECONDS = 60.0
# Half precision halves the largest files by far; a cosine needs no more.
TYPES = {"dense_vecs": np.float32, "token_weights": np.float32, "colbert_vecs": np.float16}
TYPES["last_states"] = np.float32  # heads that are trained on them are those of a run without cache
# Raised when the files' layout changes.
FORMAT = 4


def compute_cache_key(texts: TokenizedTexts, teacher_fingerprint: str) -> str:
    """Key of the outputs: the exact token ids, prompts included, and the exact teacher."""
    digest = hashlib.sha256(f"{FORMAT}:{teacher_fingerprint}".encode())
    for array in (texts.ids, texts.starts):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:24]


def compute_cache_bytes(
    texts: int, tokens: int, names: Sequence[str], hidden_size: int, colbert_dim: int
) -> int:
    """Bytes on disk of the outputs of so many texts, which have so many tokens together."""
    numbers = {"dense_vecs": texts * hidden_size, "token_weights": tokens}
    numbers |= {"colbert_vecs": tokens * colbert_dim, "last_states": tokens * hidden_size}
    return sum(numbers[name] * np.dtype(TYPES[name]).itemsize for name in names)


class _Piece(Record):
    texts: Count
    rows: Count
    width: Count | None
    digest: Text


@dataclass(frozen=True)
class _File:
    """The pieces that one process has written, one after the other.

    Attributes:
        values: A row for each text or, of an output of tokens, for each token of each text.
        texts: Numbers of the texts, shape ``(n,)``.
    """

    values: np.ndarray
    texts: np.ndarray


class _Output:
    """One output of the texts of a source, as far as it is on disk."""

    def __init__(self, folder: Path, name: str, texts: TokenizedTexts) -> None:
        self.folder = folder
        self.name = name
        self.source = texts
        self.of_tokens = name != "dense_vecs"
        self.loaded: dict[tuple[Path, int], _File] = {}
        self.load()

    def load(self) -> None:
        """Look what is there."""
        paths = sorted(self.folder.glob(f"{self.name}-*.jsonl"))
        keys, before = [(path, path.stat().st_size) for path in paths], self.loaded
        # What was read and checked before is the same now: files only grow.
        self.loaded = {key: before.get(key) or _read_file(key[0], TYPES[self.name]) for key in keys}
        files = [file for file in self.loaded.values() if len(file.texts)]
        self.values = [file.values for file in files]
        texts = np.concatenate([np.zeros(0, np.int64), *(file.texts for file in files)])
        numbers = np.repeat(np.arange(len(files)), [len(file.texts) for file in files])
        rows = np.concatenate([np.zeros(0, np.int64), *map(self._first_rows, files)])
        # Two processes may have embedded the same text: any of the two will do.
        self.texts, first = np.unique(texts, return_index=True)
        self.files, self.rows = numbers[first], rows[first]

    def _first_rows(self, file: _File) -> np.ndarray:
        if not self.of_tokens:
            return np.arange(len(file.texts))
        lengths = text_lengths(self.source, file.texts)
        return np.cumsum(lengths) - lengths

    def holds(self, texts: np.ndarray) -> np.ndarray:
        """Whether each text is there."""
        if not len(self.texts):
            return np.zeros(len(texts), bool)
        return self.texts[np.searchsorted(self.texts[:-1], texts)] == texts

    def read(self, texts: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """The values of texts: ``(texts, H)``, or of each a row for each of its tokens."""
        if not self.holds(texts).all():
            raise KeyError(f"{self.folder}: has no {self.name} of some of the texts {texts[:9]}")
        places = np.searchsorted(self.texts, texts)
        files, rows = self.files[places], self.rows[places]
        if self.of_tokens:
            ends = rows + text_lengths(self.source, texts)
            spans = zip(files, rows, ends, strict=True)
            return [self.values[file][row:end] for file, row, end in spans]
        found = np.empty((len(texts), self.values[0].shape[1]), np.float32)
        for file in np.unique(files):
            found[files == file] = self.values[file][rows[files == file]]
        return found


@dataclass(frozen=True)
class Vectors:
    """Vectors of some texts, ``(n, H)``, of which NumPy reads what is asked for and no more.

    Attributes:
        texts: Their numbers, shape ``(n,)``.
    """

    output: _Output
    texts: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """As that of an array."""
        return len(self.texts), self.output.values[0].shape[1]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: slice | np.ndarray) -> Vectors:
        return Vectors(self.output, self.texts[index])

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        return self.output.read(self.texts).astype(dtype or np.float32, copy=False)


def text_lengths(texts: TokenizedTexts, numbers: np.ndarray) -> np.ndarray:
    """Tokens of some texts."""
    return texts.starts[numbers + 1] - texts.starts[numbers]


def _read_file(path: Path, dtype: type) -> _File:
    """Map what a process has written, but for a piece that it did not finish."""
    fix = f"delete {path.parent}; it is made again"
    lines = path.read_bytes().split(b"\n")[:-1]
    pieces = [
        parse_record(parse_json(line, f"{path}:{number}", fix), _Piece, f"{path}:{number}", fix)
        for number, line in enumerate(lines, 1)
    ]
    if not pieces:
        return _File(np.zeros(0, dtype), np.zeros(0, np.int64))
    rows, width = sum(piece.rows for piece in pieces), pieces[0].width
    shape = (rows,) if width is None else (rows, width)
    try:
        values = np.memmap(path.with_suffix(".values"), dtype, "r", shape=shape)
        count = sum(piece.texts for piece in pieces)
        content = path.with_suffix(".texts").read_bytes()[: count * np.dtype(np.int64).itemsize]
        texts = np.frombuffer(content, np.int64)
        if len(texts) < count:
            raise ValueError("the numbers of texts are too few")
        _check_pieces(pieces, values, texts)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: damaged or not complete ({error}). To fix, {fix}.") from error
    return _File(values, texts)


def _check_pieces(pieces: Sequence[_Piece], values: np.ndarray, texts: np.ndarray) -> None:
    """Compare the checksums of pieces spread over a file: of all if it has 1 GiB or less."""
    every = -(-values.nbytes // (BLOCK * BLOCKS))
    row = text = 0
    for number, piece in enumerate(pieces):
        part = texts[text : text + piece.texts], values[row : row + piece.rows]
        if number % every == 0 and piece.digest != _digest_piece(*part):
            raise ValueError(f"the checksum of line {number + 1} is not that of its content")
        row, text = row + piece.rows, text + piece.texts


def _digest_piece(texts: np.ndarray, values: np.ndarray) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(texts), digest_size=DIGEST_BYTES)
    digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()


class TeacherCache:
    """The teacher's outputs of the texts of a source, on disk as far as they were asked for.

    Args:
        folder: Its name must hold :func:`compute_cache_key`.
        names: Outputs that are wanted.

    Raises:
        ValueError: If a file is damaged.
    """

    def __init__(self, texts: TokenizedTexts, folder: Path, names: Sequence[str]) -> None:
        self.texts = texts
        self.folder = folder
        self.outputs = {name: _Output(folder, name, texts) for name in names}

    def missing(self, texts: np.ndarray) -> np.ndarray:
        """Those of the texts that lack an output."""
        return texts[~np.all([o.holds(texts) for o in self.outputs.values()], axis=0)]

    def missing_tokens(self, texts: np.ndarray) -> int:
        """Tokens of those."""
        return int(text_lengths(self.texts, self.missing(texts)).sum())

    def fill(
        self, texts: np.ndarray, encode: Encode, pad_token_id: int, report: Report | None = None
    ) -> None:
        """Embed what is missing, in batches of similar length, the longest texts first.

        One process does it; others wait for it, and find what it has written.
        """
        self._load()
        if not len(self.missing(texts)):
            return
        with lock_of(self.folder):
            self._load()
            lacks = np.stack([~output.holds(texts) for output in self.outputs.values()])
            # Texts that lack the same outputs go together.
            for pattern in np.unique(lacks, axis=1).T[::-1]:
                names = [
                    name for name, lacking in zip(self.outputs, pattern, strict=True) if lacking
                ]
                part = texts[(lacks == pattern[:, None]).all(axis=0)]
                for tokens in self._embed(part, encode, pad_token_id, names) if names else ():
                    if report is not None:
                        report(tokens)
            self._load()

    def _load(self) -> None:
        for output in self.outputs.values():
            output.load()

    def _embed(
        self, texts: np.ndarray, encode: Encode, pad_token_id: int, names: Sequence[str]
    ) -> Iterator[int]:
        """Write outputs of texts, and tell after every batch how many tokens it had."""
        mark = uuid.uuid4().hex[:8]
        files = [self.folder / f"{name}-{mark}" for name in names]
        pending: list[tuple[np.ndarray, list[np.ndarray]]] = []
        size, begun = 0, time.monotonic()
        for index in batch_indices(text_lengths(self.texts, texts), BATCH_TEXTS, BATCH_TOKENS):
            batch = texts[index]
            outputs = encode(*pad_texts([self.texts[i] for i in batch], pad_token_id))
            lengths = text_lengths(self.texts, batch)
            pending.append((batch, [_rows_of(name, outputs[name], lengths) for name in names]))
            size += sum(values.nbytes for values in pending[-1][1])
            if size >= PIECE_BYTES or time.monotonic() - begun >= PIECE_SECONDS:
                _write_piece(files, pending)
                pending, size, begun = [], 0, time.monotonic()
            yield int(lengths.sum())
        if pending:
            _write_piece(files, pending)

    def add(self, texts: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        """Write outputs that are known, by name: a row for each text, or for each of its tokens."""
        mark = uuid.uuid4().hex[:8]
        files = [self.folder / f"{name}-{mark}" for name in outputs]
        _write_piece(files, [(texts, list(outputs.values()))])
        self._load()

    def items(self, example: np.ndarray) -> dict[str, object]:
        """The outputs of an example's texts, as ``Collator`` reads them."""
        return {f"teacher_{name}": output.read(example) for name, output in self.outputs.items()}


def _rows_of(name: str, output: Tensor, lengths: np.ndarray) -> np.ndarray:
    """The values of a batch without padding: a row for each text, or for each token of each text.

    Multi-vectors get a row of zeros for CLS, so that all outputs of tokens are laid out as the ids.
    """
    values = output.float().cpu().numpy().astype(TYPES[name], copy=False)
    if name == "dense_vecs":
        return values
    if name == "colbert_vecs":
        values = np.pad(values, ((0, 0), (1, 0), (0, 0)))
    return np.concatenate([row[:length] for row, length in zip(values, lengths, strict=True)])


def _write_piece(
    files: Sequence[Path], pending: Sequence[tuple[np.ndarray, list[np.ndarray]]]
) -> None:
    """Append a piece to the files of each output; its line comes last."""
    files[0].parent.mkdir(parents=True, exist_ok=True)
    texts = np.concatenate([texts for texts, _ in pending]).astype(np.int64)
    for number, file in enumerate(files):
        values = np.concatenate([outputs[number] for _, outputs in pending])
        piece = {
            "texts": len(texts),
            "rows": len(values),
            "width": values.shape[1] if values.ndim > 1 else None,
            "digest": _digest_piece(texts, values),
        }
        _append(file.with_suffix(".values"), values)
        _append(file.with_suffix(".texts"), texts)
        _append(file.with_suffix(".jsonl"), json.dumps(piece).encode() + b"\n")


def _append(path: Path, content: np.ndarray | bytes) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
