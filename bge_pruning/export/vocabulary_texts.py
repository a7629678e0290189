"""Choose the tokens that texts need, and report what each corpus loses without the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_pruning.config.names import HUB
from bge_pruning.datasets.embedding_dataset import TokenizedTexts, tokenize
from bge_pruning.datasets.sts_dataloader import read_sentences
from bge_pruning.datasets.tables import Table, table_paths
from bge_pruning.export.vocabulary import (
    KeptVocabulary,
    check_trimmable,
    choose_vocabulary,
    prompt_ids,
)
from bge_pruning.export.vocabulary_files import read_tokenizer, rewrite_tokenizer_files
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

# One corpus for each language, in a checkout of the project.
SHIPPED = Path(__file__).parents[2] / "data" / "sentences"
# Texts that are tokenised together.
CHUNK = 8192
# At most this many texts of each corpus are tokenised a second time for the report.
REPORTED = 100_000
# A corpus with a larger share of tokens that occur once is too small for its language.
FEW_TEXTS = 0.01
# Names of the fields of Corpora in the report.
ROLES = {"chosen": "chosen from", "held_out": "held out", "other": "other shipped"}


@dataclass(frozen=True)
class VocabularyRequest:
    """Which tokens a user wants to keep.

    Attributes:
        texts: Files (or patterns, or ``hf://`` datasets) whose tokens are kept, as
            :func:`bge_pruning.datasets.sts_dataloader.read_sentences` reads them.
        languages: Languages whose shipped corpus is added to them.
        size: Tokens to keep, or ``None`` for all that occur.
        report_on: Further files, to measure what is lost there.
        shipped: Folder with a file ``<name>-<language>.txt`` (or ``.txt.gz``) for each language.
    """

    texts: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    size: int | None = None
    report_on: tuple[str, ...] = ()
    shipped: Path = SHIPPED


@dataclass(frozen=True)
class Corpora:
    """Paths by what they are for; none is in two of them.

    Attributes:
        chosen: The tokens to keep are counted in these.
        held_out: Further files that the user names.
        other: Shipped corpora of languages that were not asked for.
    """

    chosen: tuple[str, ...]
    held_out: tuple[str, ...]
    other: tuple[str, ...]


def choose_for_texts(base: BaseModel, request: VocabularyRequest) -> tuple[KeptVocabulary, Corpora]:
    """Choose the tokens that some texts need, and the corpora to measure the loss on."""
    corpora = find_corpora(request)
    check_trimmable(base, request.size)
    tokenizer = plain_tokenizer(base.tokenizer_files)
    counts = {path: count_tokens(path, tokenizer) for path in corpora.chosen}
    _warn_if_small(counts)
    keep = choose_vocabulary(base, counts | _after_prompts(base, tokenizer, corpora), request.size)
    if len(keep) == (tokens := tokenizer.get_vocab_size()):
        log.info("all %d tokens are kept: the texts need every one", tokens)
    elif request.size is not None and len(keep) < request.size:
        log.info("%d tokens are kept, not %d: the texts have no more", len(keep), request.size)
    return keep, corpora


def _after_prompts(
    base: BaseModel, tokenizer: Tokenizer, corpora: Corpora
) -> dict[str, np.ndarray]:
    """Counts, as :func:`count_tokens`, of texts behind prompts that do not end with a space.

    Their first words have other tokens there: no piece begins with a space.
    """
    known, counts = sorted(prompt_ids(base)), {}
    for prompt in set((base.prompts.get("prompts") or {}).values()) - {""}:
        if not prompt[-1].isspace():
            counts[prompt] = sum(count_tokens(path, tokenizer, prompt) for path in corpora.chosen)
            counts[prompt][known] = 0  # the prompt itself says nothing of the texts
    return counts


def find_corpora(request: VocabularyRequest) -> Corpora:
    """The files of a request."""
    if not request.texts and not request.languages:
        raise ValueError(
            "no texts say which tokens to keep. To fix, pass --keep-vocabulary-from FILES or "
            "--languages."
        )
    shipped = shipped_corpora(request.shipped)
    if unknown := [name for name in request.languages if name not in shipped]:
        raise ValueError(
            f"no corpus of {', '.join(unknown)} is shipped, only of {', '.join(shipped) or 'none'}."
            f" To fix, pass --keep-vocabulary-from with texts of that language."
        )
    chosen = [*_files(request.texts), *(shipped[name] for name in request.languages)]
    held_out = _files(request.report_on)
    unique = dict.fromkeys(chosen)
    rest = dict.fromkeys(path for path in held_out if path not in unique)
    other = [path for path in shipped.values() if path not in unique and path not in rest]
    return Corpora(tuple(unique), tuple(rest), tuple(other))


def shipped_corpora(folder: Path = SHIPPED) -> dict[str, str]:
    """The corpus of each language that has one, by language."""
    names = {path.name.partition(".")[0]: path for path in sorted(folder.glob("*-*.txt*"))}
    return {name.rpartition("-")[2]: _name(path) for name, path in names.items()}


def _files(patterns: Iterable[str]) -> list[str]:
    # What is missing is said now, not after hours of counting in the files before it.
    paths = [path for pattern in patterns for path in table_paths(pattern)]
    return [path if path.startswith(HUB) else _name(Path(path)) for path in paths]


def _name(path: Path) -> str:
    """The path as messages and reports show it: short below the current folder."""
    whole = path.resolve()
    return str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole)


def plain_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """A tokenizer that neither cuts, pads nor sets special tokens."""
    from tokenizers import Tokenizer

    content = json.loads(files["tokenizer.json"])
    plain = {**content, "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(plain))


def _batches(path: str, limit: int | None = None) -> Iterator[list[str]]:
    """Texts of a corpus, some thousand at a time."""
    texts = islice((row.text for row in read_sentences(Table(path))), limit)
    batch = list(islice(texts, CHUNK))
    if not batch:
        raise ValueError(f"{path}: holds no text. To fix, choose another file.")
    while batch:
        yield batch
        batch = list(islice(texts, CHUNK))


def count_tokens(path: str, tokenizer: Tokenizer, prompt: str = "") -> np.ndarray:
    """How often each id occurs in a corpus, whose texts follow the prompt; int64."""
    size = max(tokenizer.get_vocab().values()) + 1
    counts = np.zeros(size, np.int64)
    for batch in _batches(path):
        texts = [prompt + text for text in batch]
        counts += np.bincount(tokenize(texts, tokenizer).ids, minlength=size)
    return counts


def _warn_if_small(counts: Mapping[str, np.ndarray]) -> None:
    """Say which corpus is the smallest for its language, and how many others are small."""
    # What has been seen once estimates what has not been seen yet (Good, 1953).
    shares = {path: (c == 1).sum() / max(c.sum(), 1) for path, c in counts.items()}
    worst, few = max(shares, key=shares.get), sum(share > FEW_TEXTS for share in shares.values())
    if few:
        log.warning(
            "%s: %.1f %% of its %d tokens occur once, so about that share of the tokens of other "
            "texts of its kind is not among them%s. Use more texts, or see the report on held-out "
            "ones.",
            *(worst, 100 * shares[worst], counts[worst].sum()),
            f" (and a smaller share in {few - 1} more)" if few > 1 else "",
        )


def build_report(
    shape: EncoderShape,
    files: Mapping[str, bytes],
    keep: KeptVocabulary,
    corpora: Corpora,
    limit: int = REPORTED,
) -> dict[str, Any]:
    """Report what is saved and what each corpus loses, in plain values.

    Returns:
        ``vocabulary`` (``source``, ``kept``, ``required``, ``rows_saved``), ``scripts``,
        ``parameters`` (``source``, ``trimmed``: the total; ``saved``, ``share_saved``), and
        ``coverage``, a row for each corpus: ``corpus``, ``role`` and what
        :func:`compare_tokenizers` says.
    """
    before = count_parameters(shape).total
    after = count_parameters(replace(shape, vocab_size=len(keep))).total
    tokenizer = read_tokenizer(files)
    trimmed = rewrite_tokenizer_files(tokenizer, files, keep.old_ids)
    tokenizers = plain_tokenizer(files), plain_tokenizer(trimmed)
    ids = keep.old_ids, tokenizer.unknown
    coverage = [
        {
            "corpus": path,
            "role": role,
            **compare_tokenizers(_batches(path, limit), *tokenizers, *ids),
        }
        for name, role in ROLES.items()
        for path in getattr(corpora, name)
    ]
    return {
        "vocabulary": {
            "source": shape.vocab_size,
            "kept": len(keep),
            "required": keep.required,
            "rows_saved": shape.vocab_size - len(keep),
        },
        "scripts": list(keep.scripts),
        "parameters": {
            "source": before,
            "trimmed": after,
            "saved": before - after,
            "share_saved": 1.0 - after / before,
        },
        "coverage": coverage,
    }


def compare_tokenizers(
    batches: Iterable[list[str]],
    before: Tokenizer,
    after: Tokenizer,
    old_ids: np.ndarray,
    unknown: int | None,
) -> dict[str, float]:
    """Measure how much of some texts the untrimmed and the trimmed tokenizer read alike.

    ``old_ids`` are the old ids of all new ones; ``unknown`` is that of the unknown token, if any.

    Returns:
        ``texts``, ``tokens`` (of the untrimmed tokenizer), ``tokens_kept`` (share of them that the
        trimmed vocabulary has), ``texts_same`` (share of texts with exactly the same tokens),
        ``growth`` (tokens after divided by tokens before), ``unknown_before`` and ``unknown_after``
        (share of tokens).
    """
    sums = np.zeros(7, np.int64)
    for batch in batches:
        old, new = tokenize(batch, before), tokenize(batch, after)
        back = TokenizedTexts(old_ids[new.ids], new.starts, 0)
        sums[:2] += len(old), _count_same(old, back)
        sums[2:5] += len(old.ids), len(back.ids), np.isin(old.ids, old_ids).sum()
        sums[5:] += (old.ids == unknown).sum(), (back.ids == unknown).sum()
    texts, same, tokens, tokens_after, kept_tokens, unknown_before, unknown_after = sums.tolist()
    return {
        "texts": texts,
        "tokens": tokens,
        "tokens_kept": kept_tokens / max(tokens, 1),
        "texts_same": same / texts,
        "growth": tokens_after / max(tokens, 1),
        "unknown_before": unknown_before / max(tokens, 1),
        "unknown_after": unknown_after / max(tokens_after, 1),
    }


def _count_same(first: TokenizedTexts, second: TokenizedTexts) -> int:
    """Texts with the same ids."""
    alike = first.lengths == second.lengths
    a = first.ids[np.repeat(alike, first.lengths)]
    b = second.ids[np.repeat(alike, second.lengths)]
    text = np.repeat(np.arange(len(first))[alike], first.lengths[alike])
    return int(alike.sum() - len(np.unique(text[a != b])))
