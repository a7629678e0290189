"""Trim a model to fewer tokens: which are kept, and why their texts keep their vectors.

A text is *kept* if the untrimmed tokenizer makes only kept tokens of it. Then the trimmed one makes
the same tokens of it, and the model the same outputs, bit for bit:

* **Unigram** takes the segmentation of the highest score, and of several the one whose last piece
  is longest, then the last but one, and so on. Every segmentation that the trimmed vocabulary
  offers was there before, so none is better than the old best, and that one is still there. Where
  there are ties, the earlier of them is still met first. Two things could break this. A character
  without a piece of its own may be ``<unk>`` at the lowest score of the vocabulary less a penalty:
  a character that loses its piece then gets this new edge, but it is worse than the piece was; and
  if the lowest score changed, so would all ``<unk>`` edges. So the piece of the lowest score is
  always kept.
* **WordPiece** takes the longest piece in the vocabulary each time. The piece that it took is kept,
  and there is no longer one now that there was not before. A word that it gave up on could be
  split after a long piece is gone, but only if some character has a piece inside of others and none
  alone; texts without the unknown token are kept in any case.
* **WordLevel** looks words up.

The tokens of the model's own prompts are kept with those of the texts. Other texts are still
tokenised, into more and shorter pieces. So that this does not end in ``<unk>``, the pieces of
single characters are kept: those of the scripts that the texts are written in, and all that belong
to no script (digits, punctuation, symbols). A text of characters that have such a piece never
becomes ``<unk>``. WordLevel has no pieces: a word that is not kept is unknown.
"""

from __future__ import annotations

import copy
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from bge_pruning.export.pruning_record import as_parameters
from bge_pruning.export.vocabulary_files import (
    TokenizerContent,
    read_tokenizer,
    rewrite_tokenizer_files,
    special_ids,
)
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.utils.records import PruningRecord

# A script is kept if it makes up this share of the letters of one of the corpora: a foreign name
# in a news text is no reason to keep all Chinese characters.
SCRIPT_SHARE = 0.01
COMMON = "common"
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class KeptVocabulary:
    """The tokens that a trimmed model has.

    Attributes:
        old_ids: Old id of each new id, shape ``(V',)``, int64.
        required: How many of them are kept regardless of the texts.
        scripts: Scripts whose characters are among those.
        digest: SHA-256 of the ``tokenizer.json`` that they were chosen from.
    """

    old_ids: np.ndarray
    required: int
    scripts: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.old_ids)


def choose_vocabulary(
    base: BaseModel, counts: Mapping[str, np.ndarray], size: int | None = None
) -> KeptVocabulary:
    """Choose the tokens to keep: ``size`` of them, the most frequent beside the required, or all.

    Required are special tokens, those of the model's prompts, and the pieces of
    :func:`_needed_pieces`.
    Special tokens keep their ids where they can; those beyond the new size (``<mask>`` of XLM-R) go
    to the end. The other tokens keep their order. Counts are those of each id in each corpus, by
    name, ``(ids,)``; special tokens that are set around a text are not counted.
    """
    tokenizer = check_trimmable(base, size)
    special = special_ids(tokenizer, base.tokenizer_files)
    special |= set(_config_ids(tokenizer, base.hf_config).values())
    ordinary = {name: _without(values, special) for name, values in counts.items()}
    scripts = _kept_scripts(tokenizer, ordinary)
    required = special | prompt_ids(base) | _needed_pieces(tokenizer, scripts)
    if size is not None and size < len(required):
        raise ValueError(
            f"vocabulary_size {size} is below the {len(required)} tokens that must stay: special "
            f"tokens, those of the model's prompts, and the characters of the texts' scripts. To "
            f"fix, choose {len(required)} or more."
        )
    total = _without(sum(counts.values()), required)
    # The lower id first among tokens that are equally frequent: XLM-R's are sorted by score.
    frequent = np.argsort(-total, kind="stable")[: np.count_nonzero(total)]
    if size is not None:
        frequent = frequent[: size - len(required)]
    kept = required.union(frequent.tolist())
    old_ids = _arrange(kept, special, tokenizer.beyond)
    pad = base.hf_config["pad_token_id"]
    if (new := int(np.flatnonzero(old_ids == pad)[0])) != pad:
        raise ValueError(
            f"pad_token_id {pad} would become {new}, and positions are counted from it, so every "
            f"vector would change. To fix, keep {pad + 1} tokens or more, or leave the vocabulary "
            f"as it is."
        )
    return KeptVocabulary(old_ids, len(required), tuple(sorted(scripts)), tokenizer.digest)


def check_trimmable(base: BaseModel, size: int | None = None) -> TokenizerContent:
    """Refuse what cannot be trimmed, before texts are read for it.

    Rows of the embeddings without a token are not an error: some models pad the table, and
    trimming drops them.
    """
    tokenizer = read_tokenizer(base.tokenizer_files)
    if tokenizer.size > base.shape.vocab_size:
        raise ValueError(
            f"tokenizer.json has {tokenizer.size} tokens but the embeddings have "
            f"{base.shape.vocab_size} rows. To fix, use the tokenizer and the weights of the same "
            f"model."
        )
    _config_ids(tokenizer, base.hf_config)
    if size is not None and size > len(tokenizer.tokens):
        raise ValueError(
            f"vocabulary_size {size} is above the {len(tokenizer.tokens)} tokens of the model. To "
            f"fix, choose fewer, or leave it out to keep every token of the texts."
        )
    return tokenizer


def _without(counts: np.ndarray, ids: set[int]) -> np.ndarray:
    counts = counts.copy()
    counts[sorted(ids)] = 0
    return counts


def _config_ids(tokenizer: TokenizerContent, hf_config: dict[str, Any]) -> dict[str, int]:
    """Token ids that ``config.json`` names, by key."""
    ids = {k: v for k, v in hf_config.items() if k.endswith("_token_id") and isinstance(v, int)}
    if unknown := {key: value for key, value in ids.items() if value not in tokenizer.tokens}:
        key, value = next(iter(unknown.items()))
        raise ValueError(
            f"config.json: {key} is {value}, but tokenizer.json has no token of that id. To fix, "
            f"correct the id, or set it to null if the model has no such token."
        )
    return ids


def prompt_ids(base: BaseModel) -> set[int]:
    """Tokens of the model's prompts, which are in front of every text but in no corpus."""
    from tokenizers import Tokenizer

    prompts = list((base.prompts.get("prompts") or {}).values())
    tokenizer = Tokenizer.from_str(base.tokenizer_files["tokenizer.json"].decode())
    tokenizer.no_truncation()
    # In front of a text the space at the end of a prompt is a part of the text's first token.
    texts = [*prompts, *map(str.strip, prompts)]
    return {i for e in tokenizer.encode_batch(texts, add_special_tokens=False) for i in e.ids}


@cache
def script_of(character: str) -> str:
    """Script of a letter or mark, by the first word of its Unicode name; else ``"common"``."""
    if unicodedata.category(character)[0] not in "LM":
        return COMMON
    script = re.split("[ -]", unicodedata.name(character, COMMON))[0]
    return COMMON if script == "COMBINING" else script


def _kept_scripts(tokenizer: TokenizerContent, counts: Mapping[str, np.ndarray]) -> set[str]:
    """Scripts that the corpora are written in."""
    kept: set[str] = set()
    for values in counts.values():
        letters: Counter[str] = Counter()
        for index in np.flatnonzero(values):
            for script in map(script_of, tokenizer.tokens[int(index)]):
                letters[script] += int(values[index])
        del letters[COMMON]
        least = SCRIPT_SHARE * sum(letters.values())
        kept |= {script for script, number in letters.items() if number >= least}
    return kept


def _needed_pieces(tokenizer: TokenizerContent, scripts: set[str]) -> set[int]:
    """Pieces that keep other texts from becoming unknown, and the piece of the lowest score."""
    if tokenizer.kind == "WordLevel":
        return set()
    scripts = scripts | {COMMON}
    model = tokenizer.content["model"]
    prefix = model.get("continuing_subword_prefix", "") if tokenizer.kind == "WordPiece" else ""
    stems = {index: token.removeprefix(prefix) for index, token in tokenizer.tokens.items()}
    needed = {i for i, stem in stems.items() if len(stem) == 1 and script_of(stem) in scripts}
    if model.get("byte_fallback"):
        needed |= {i for i, token in tokenizer.tokens.items() if BYTE_PIECE.fullmatch(token)}
    if tokenizer.kind == "Unigram":
        scores = tokenizer.scores
        needed.add(min(scores, key=scores.__getitem__))
    return needed


def _arrange(kept: set[int], special: set[int], beyond: frozenset[int]) -> np.ndarray:
    """Old id of each new id."""
    own = kept - beyond
    special = special - beyond
    fixed = {index for index in special if index < len(own)}
    free = [index for index in range(len(own)) if index not in fixed]
    rest = [*sorted(own - special), *sorted(special - fixed)]
    places = {**{index: index for index in fixed}, **dict(zip(free, rest, strict=True))}
    return np.array([places[new] for new in range(len(own))] + sorted(beyond), np.int64)


def trim_vocabulary(base: BaseModel, keep: KeptVocabulary) -> BaseModel:
    """A new model with only the kept tokens.

    Only the kept rows of the word embeddings are copied. All other weights are shared with
    ``base``, so let go of it to free the old table.
    """
    tokenizer = check_trimmable(base)
    if keep.digest != tokenizer.digest:
        raise ValueError(
            f"the tokens to keep were chosen from another tokenizer than that of {base.name}. To "
            f"fix, choose them from this model."
        )
    shape = replace(base.shape, vocab_size=len(keep))
    new_ids = {int(old): new for new, old in enumerate(keep.old_ids)}
    ids = {key: new_ids[old] for key, old in _config_ids(tokenizer, base.hf_config).items()}
    return replace(
        base,
        shape=shape,
        hf_config={**base.hf_config, **ids, "vocab_size": len(keep)},
        backbone=_with_rows(base.backbone, keep.old_ids),
        tokenizer_files=rewrite_tokenizer_files(tokenizer, base.tokenizer_files, keep.old_ids),
        pruning=base.pruning and _trimmed_record(base.pruning, shape),
    )


@torch.no_grad()
def _with_rows(backbone: XLMRobertaBackbone, rows: np.ndarray) -> XLMRobertaBackbone:
    """A copy of the encoder with some rows of the word embeddings, and the other tensors shared."""
    old = backbone.embeddings.word_embeddings.weight
    new = nn.Parameter(old[torch.from_numpy(rows).to(old.device)], old.requires_grad)
    shared = {id(p): p for p in backbone.parameters()}
    trimmed = copy.deepcopy(backbone, {**shared, id(old): new})
    trimmed.embeddings.word_embeddings.num_embeddings = len(rows)
    trimmed.shape = replace(backbone.shape, vocab_size=len(rows))
    return trimmed


def _trimmed_record(pruning: PruningRecord, shape: EncoderShape) -> PruningRecord:
    """``pruning.json`` of an extracted model, with the new sizes."""
    record = pruning.model_copy(deep=True)
    record.shape.vocab_size = shape.vocab_size
    record.parameters.extracted = as_parameters(shape)
    return record
