"""Queries with positive and negative passages: read the BGE format, and sample examples.

A row is ``{"query": str, "pos": [str, ...], "neg": [str, ...]}``, one JSON object a line, plain or
``.gz``; optional are ``pos_scores``, ``neg_scores`` (a teacher's scores) and ``prompt`` (written
before the query instead of the model's own). A Hugging Face dataset may have those columns too, or,
as a CSV file, columns ``query``, ``pos`` and optionally ``neg`` of single texts. In place of texts
there may be the ids of texts in other tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from bge_pruning.config.names import SOURCE_COLUMNS
from bge_pruning.datasets.embedding_dataset import Targets, TokenizedTexts, perturb_texts
from bge_pruning.datasets.rows import BadRows, Row, RowTable
from bge_pruning.datasets.tables import Table, load_table, read_table
from bge_pruning.datasets.text_files import check_text

# Bytes of the hash by which an id is found.
ID_BYTES = 8
KEYS, OPTIONAL = SOURCE_COLUMNS["contrastive"][:3], SOURCE_COLUMNS["contrastive"][3:]


def read_contrastive(table: Table, bad: BadRows | None = None) -> Iterator[Row]:
    """Read a file row by row."""
    bad = bad or BadRows()
    # In JSON lines of the format, a row without neg is rather one with a misspelt key.
    of_format = not table.columns and ".jsonl" in Path(table.path).suffixes
    strict = of_format and not table.on_hub
    required = KEYS if strict else KEYS[:2]
    texts = {role: TextsById(part) for role, part in table.collection.items()}

    def parse(cells: Mapping[str, Any], where: str) -> Row:
        cells = cells if strict else _with_lists(cells)
        return _parse_row(_with_texts(cells, texts, where) if texts else cells, where)

    for where, cells in read_table(table, required, bad, optional=(*OPTIONAL, "neg")):
        row = bad.attempt(parse, cells, where)
        if row is not None:
            yield row


class TextsById:
    """The texts of a table by their ids: a few numbers a text are held, not the texts.

    Its columns are ``text``, and the first whose name ends with ``id``.

    Raises:
        ValueError: If it has none of these.
    """

    def __init__(self, table: Table) -> None:
        names = load_table(table).column_names
        id_names = [name for name in names if name.lower().endswith("id")]
        if not id_names or "text" not in names:
            raise ValueError(
                f"{table.path}: subset {table.subset} of the collection needs a column text and "
                f"one whose name ends with id, but has {', '.join(names)}. To fix, name another."
            )
        self.name = f"{table.path} {table.subset}"
        arrow = load_table(table).select_columns([id_names[0], "text"]).with_format("arrow")[:]
        self._ids, self._texts = arrow.columns
        numbers = (_id_number(i) for chunk in self._ids.chunks for i in chunk.to_pylist())
        hashes = np.fromiter(numbers, np.uint64, len(self._ids))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def find(self, given: object, where: str) -> str:
        """The text with an id."""
        place = np.searchsorted(self._hashes, np.uint64(_id_number(given)))
        row = int(self._order[place]) if place < len(self._order) else -1
        if row < 0 or str(self._ids[row]) != str(given):
            raise ValueError(
                f"{where}: {self.name} has no text with the id {str(given)[:40]!r}. To fix, "
                f"correct or remove the row, or name another subset under collection of the source."
            )
        return self._texts[row].as_py()


def _id_number(given: object) -> int:
    digest = hashlib.blake2b(str(given).encode(), digest_size=ID_BYTES).digest()
    return int.from_bytes(digest, "little")


def _with_texts(
    cells: Mapping[str, Any], texts: Mapping[str, TextsById], where: str
) -> dict[str, Any]:
    """Cells with texts in place of their ids."""
    found = dict(cells)
    if "query" in texts:
        found["query"] = texts["query"].find(cells["query"], where)
    for key in KEYS[1:] if "passage" in texts else ():
        found[key] = [texts["passage"].find(i, where) for i in cells.get(key) or ()]
    return found


def _with_lists(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Passages as lists: in other tables, pairs and triplets are columns of single texts.

    An empty prompt is none there; in a JSON line it says that there is to be none.
    """
    lists = {key: cells.get(key) for key in KEYS[1:]}
    single = {k: [] if v in (None, "") else [v] for k, v in lists.items() if type(v) is not list}
    return {**cells, **single, "prompt": cells.get("prompt") or None}


def _parse_row(cells: Mapping[str, Any], where: str) -> Row:
    query = check_text(cells["query"], f"{where}: query")
    prompt = cells.get("prompt")
    if prompt not in (None, ""):
        check_text(prompt, f"{where}: prompt")
    pos, neg = (_check_texts(cells.get(key, []), f"{where}: {key}") for key in ("pos", "neg"))
    if not pos:
        raise ValueError(f"{where}: pos is empty. To fix, add a passage or remove the line.")
    pos_scores = _check_scores(cells.get("pos_scores"), len(pos), f"{where}: pos_scores")
    neg_scores = _check_scores(cells.get("neg_scores"), len(neg), f"{where}: neg_scores")
    # Scores of only some passages do not form a distribution.
    complete = pos_scores is not None and (neg_scores is not None or not neg)
    scores = (*pos_scores, *(neg_scores or ())) if complete else None
    return Row(query, (*pos, *neg), len(pos), scores, prompt)


def _check_texts(value: Any, what: str) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list. To fix, write a list of texts.")
    return [check_text(text, f"{what}[{index}]") for index, text in enumerate(value)]


def _is_number(value: Any) -> bool:
    # A float32 holds no more than this, and NaN is not below it.
    return type(value) in (int, float) and abs(value) < 1e38


def _check_scores(value: Any, count: int, what: str) -> list[float] | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and all(_is_number(v) for v in value)
    if not numbers or len(value) != count:
        raise ValueError(
            f"{what} must be {count} numbers, one for each text. To fix, correct the line."
        )
    return [float(v) for v in value]


def sample_example(
    rows: RowTable, row: int, negatives: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The texts of one example: the query, one positive, and some negatives.

    Which positive and negatives are drawn follows from ``(seed, epoch, row)`` alone. A row with too
    few negatives repeats them, as FlagEmbedding does; a row with none has none. Returns text
    indices, at most ``2 + negatives``, and the scores of the passages, NaN where the row has none.
    """
    generator = np.random.default_rng((seed, epoch, row))
    count, given = rows.positives[row], len(rows.negatives_of(row))
    positive = generator.integers(count)
    if negatives == 0 or given == 0:
        drawn = np.empty(0, np.int64)
    elif given >= negatives:
        drawn = generator.choice(given, negatives, replace=False)
    else:
        repeats = -(-negatives // given)
        drawn = generator.permutation(np.tile(np.arange(given), repeats))[:negatives]
    chosen = rows.starts[row] + 1 + np.concatenate([[positive], count + drawn])
    example = np.concatenate([[rows.texts[rows.starts[row]]], rows.texts[chosen]])
    return example, np.asarray(rows.scores[chosen])


def known_positives(rows: RowTable, own: RowTable | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All positives of each row's query, over every row that has the same query.

    None of them may serve as a negative of the query. Returns the positives of all queries, one
    query after the other, and where those of each row's query begin and end, shape ``(n, 2)``.
    Texts are the same here whatever their prompts: numbers are :meth:`RowTable.words_of`.

    Args:
        own: Rows of a query and the passage that is the query itself, which counts as a positive.
    """
    queries = np.repeat(rows.words_of(rows.first), rows.positives)
    passages = rows.words_of(rows.texts[rows.roles == 1])
    if own is not None:
        queries = np.concatenate([queries, rows.words_of(own.first)])
        passages = np.concatenate([passages, rows.words_of(own.texts[own.roles > 0])])
    first = rows.words_of(rows.first)
    # One number a pair: unique over whole rows of an array is slower by far.
    base = int(max(first.max(initial=0), passages.max(initial=0))) + 1
    pairs = np.unique(queries * base + passages)
    bounds = [np.searchsorted(pairs, (first + end) * base) for end in (0, 1)]
    return pairs % base, np.stack(bounds, axis=1)


def add_negatives(rows: RowTable, negatives: np.ndarray) -> RowTable:
    """Add texts to the negatives of each row, ``(n, k)``; -1 where there are fewer."""
    found = negatives >= 0
    ends = np.repeat(rows.starts[1:], found.sum(axis=1))
    counts = np.diff(rows.starts) + found.sum(axis=1)
    return RowTable(
        np.insert(rows.texts, ends, negatives[found]),
        np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        rows.positives,
        np.insert(rows.scores, ends, np.nan),
        rows.words,
    )


def add_perturbed(
    texts: TokenizedTexts, rows: RowTable, count: int, first: int, seed: int
) -> tuple[TokenizedTexts, RowTable]:
    """Give rows without negatives so many, each a positive of theirs that is altered.

    See :func:`perturb_texts`. Words that are moved or missing say something else to a reader, and
    little else to a model that does not read closely.
    """
    random = np.random.default_rng(seed)
    bare = np.flatnonzero(np.diff(rows.starts) == 1 + rows.positives)
    drawn = (random.random((len(bare), count)) * rows.positives[bare, None]).astype(np.int64)
    numbers = rows.texts[rows.starts[bare, None] + 1 + drawn]
    longer, added = perturb_texts(texts, numbers.ravel(), first, random)
    negatives = np.full((len(rows), count), -1, np.int64)
    negatives[bare] = added.reshape(numbers.shape)
    if rows.words is not None:  # no copy has the words of another text
        own = rows.words.max() + 1 + np.arange(len(longer) - len(texts))
        rows = replace(rows, words=np.concatenate([rows.words, own]))
    return longer, add_negatives(rows, negatives)


class ContrastiveDataset(Dataset):
    """Examples of a query, a positive and negatives; others are drawn in every epoch.

    An index is ``epoch * len(dataset) + row``, so that an example follows from its index alone,
    in whichever process it is made.

    Args:
        negatives: Given negatives per query; every row must have at least one if it is not 0.
        scored: Give the scores of the passages too; every row must have them.
        own: See :func:`known_positives`.
        in_batch: Whether passages of other queries are negatives too.
    """

    def __init__(
        self,
        texts: TokenizedTexts,
        rows: RowTable,
        negatives: int,
        seed: int,
        scored: bool = False,
        teacher: Targets | None = None,
        own: RowTable | None = None,
        in_batch: bool = True,
    ) -> None:
        without = int((np.diff(rows.starts) == 1 + rows.positives).sum())
        if negatives and without:
            raise ValueError(
                f"data.negatives is {negatives}, but {without} of {len(rows)} rows have no neg. To "
                f"fix, set it to 0 (the other passages of a batch still are negatives), give every "
                f"row a neg, set negatives, mined_negatives or perturbed_negatives of the source, "
                f"or raise its mining_margin."
            )
        unscored = int(np.isnan(rows.scores[rows.roles > 0]).sum())
        if scored and unscored:
            raise ValueError(
                f"{unscored} passages have no pos_scores or neg_scores, which "
                f"loss.score_distillation needs. To fix, add them or set it to 0."
            )
        self.texts = texts
        self.rows = rows
        self.negatives = negatives
        self.seed = seed
        self.scored = scored
        self.in_batch = in_batch
        self.teacher = teacher
        self.known, self.known_bounds = known_positives(rows, own)

    def __len__(self) -> int:
        return len(self.rows)

    def texts_of(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of the texts of examples, one example after the other."""
        draws = (divmod(int(index), len(self)) for index in indices)
        options = (self.negatives, self.seed)
        examples = (sample_example(self.rows, row, *options, epoch)[0] for epoch, row in draws)
        return np.concatenate([np.zeros(0, np.int64), *examples])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row's query and longest positive, shape ``(n,)``."""
        lengths = np.where(self.rows.roles < 2, self.texts.lengths[self.rows.texts], 0)
        return np.maximum.reduceat(lengths, self.rows.starts[:-1])

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of all texts of an example, on average over the draws, shape ``(n,)``."""
        lengths, starts = self.texts.lengths[self.rows.texts], self.rows.starts[:-1]
        roles = self.rows.roles
        sums = [np.add.reduceat(np.where(roles == role, lengths, 0), starts) for role in range(3)]
        given = np.maximum(np.diff(self.rows.starts) - 1 - self.rows.positives, 1)
        return sums[0] + sums[1] / self.rows.positives + self.negatives * sums[2] / given

    @property
    def width(self) -> int:
        """Texts of an example."""
        return 2 + self.negatives

    def __getitem__(self, index: int) -> dict[str, object]:
        """Token ids of query and passages, and which texts they are."""
        epoch, row = divmod(index, len(self))
        example, scores = sample_example(self.rows, row, self.negatives, self.seed, epoch)
        words = self.rows.words_of(example)
        return {
            "ids": [self.texts[i] for i in example],
            "passage_texts": words[1:],
            # The query too: where pairs are given both ways round it is a passage of another row.
            "positive_texts": np.append(self.known[slice(*self.known_bounds[row])], words[0]),
            **({"passage_scores": scores} if self.scored else {}),
            **({} if self.in_batch else {"own_passages_only": np.True_}),
            **({} if self.teacher is None else self.teacher.items(example)),
        }
