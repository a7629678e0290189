"""Tokenizer files: which tokens they hold, which they refer to, and the files of fewer tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bge_pruning.model_io.tokenizer_files import dump

KINDS = ("Unigram", "WordPiece", "WordLevel")
# For each id of a trimmed model, the id in the model that it was first cut from.
MAP_FILE = "vocab_map.json"
# Holds the untrimmed vocabulary, and some loaders prefer it to tokenizer.json.
SENTENCEPIECE_FILE = "sentencepiece.bpe.model"


@dataclass(frozen=True)
class TokenizerContent:
    """A ``tokenizer.json``, read.

    Attributes:
        content: The JSON.
        kind: Type of its model, one of ``KINDS``.
        tokens: Every token by id, ids ascending, added tokens included.
        beyond: Ids of the added tokens that are not in the model's own vocabulary. The tokenizers
            library numbers them after it, whatever the file says.
        digest: SHA-256 of the file.
    """

    content: dict[str, Any]
    kind: str
    tokens: dict[int, str]
    beyond: frozenset[int]
    digest: str

    @property
    def size(self) -> int:
        """The highest id and one."""
        return max(self.tokens) + 1

    @property
    def scores(self) -> dict[int, float]:
        """Score of each piece of a Unigram model, by id."""
        return {index: score for index, (_, score) in enumerate(self.content["model"]["vocab"])}

    @property
    def unknown(self) -> int | None:
        """Id of the unknown token, if there is one."""
        model = self.content["model"]
        if self.kind == "Unigram":
            return model.get("unk_id")
        return model["vocab"].get(model["unk_token"])


def read_tokenizer(files: Mapping[str, bytes]) -> TokenizerContent:
    """Read ``tokenizer.json``."""
    from tokenizers import Tokenizer

    text = files["tokenizer.json"].decode("utf-8")
    content = json.loads(text)
    # Older files do not name the type.
    kind = type(Tokenizer.from_str(text).model).__name__
    if kind not in KINDS:
        raise ValueError(
            f"tokenizer.json: the model is of type {kind}, expected one of {', '.join(KINDS)}: the "
            f"vocabulary of others cannot be trimmed without changing how kept tokens are found. "
            f"To fix, leave the vocabulary as it is."
        )
    vocabulary = content["model"]["vocab"]
    if kind == "Unigram":
        tokens = {index: token for index, (token, _) in enumerate(vocabulary)}
    else:
        tokens = {index: token for token, index in vocabulary.items()}
    if len(set(tokens.values())) < len(vocabulary):
        raise ValueError(
            "tokenizer.json: a token or an id occurs twice in the vocabulary. To fix, copy the "
            "model's own tokenizer.json."
        )
    known = set(tokens.values())
    added = content.get("added_tokens") or []
    beyond = {t["id"]: t["content"] for t in added if t["content"] not in known}
    digest = hashlib.sha256(files["tokenizer.json"]).hexdigest()
    ordered = dict(sorted({**tokens, **beyond}.items()))
    return TokenizerContent(content, kind, ordered, frozenset(beyond), digest)


def special_ids(tokenizer: TokenizerContent, files: Mapping[str, bytes]) -> set[int]:
    """Ids that something other than a text refers to.

    Added tokens, the unknown token, and those of post-processor, padding, ``tokenizer_config.json``
    and ``special_tokens_map.json``.
    """
    content = tokenizer.content
    ids = {token["id"] for token in content.get("added_tokens") or []}
    ids |= {tokenizer.unknown, *_processor_ids(content.get("post_processor"))}
    ids |= {(content.get("padding") or {}).get("pad_id")}
    named: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = json.loads(files.get(name, b"{}"))
        ids |= {int(key) for key in config.get("added_tokens_decoder") or {}}
        values = [value for key, value in config.items() if key.endswith("_token")]
        named |= {v["content"] if isinstance(v, dict) else v for v in values if v}
    ids |= {index for index, token in tokenizer.tokens.items() if token in named}
    return ids & tokenizer.tokens.keys()


def _processor_ids(processor: dict[str, Any] | None) -> Iterator[int]:
    """Ids in a post-processor."""
    for key in ("sep", "cls"):  # of BertProcessing and RobertaProcessing
        if processor and key in processor:
            yield processor[key][1]
    for token in (processor or {}).get("special_tokens", {}).values():
        yield from token["ids"]
    for part in (processor or {}).get("processors", ()):
        yield from _processor_ids(part)


def rewrite_tokenizer_files(
    tokenizer: TokenizerContent, files: Mapping[str, bytes], old_ids: np.ndarray
) -> dict[str, bytes]:
    """The tokenizer files of fewer tokens.

    ``sentencepiece.bpe.model`` is left out: it holds the old vocabulary, and some loaders read it.
    ``vocab_map.json`` is added, see :func:`read_vocabulary_map`.

    Args:
        old_ids: Old id of each new id, shape ``(V',)``; every special id is among them, and tokens
            beyond the model's own vocabulary are last and ascending.
    """
    new_ids = {int(old): new for new, old in enumerate(old_ids)}
    changed = {
        "tokenizer.json": _tokenizer_json(tokenizer, new_ids),
        MAP_FILE: _map_json(tokenizer, files, old_ids),
    }
    rewrite = {"tokenizer_config.json": _tokenizer_config, "added_tokens.json": _added_tokens}
    for name, function in rewrite.items():
        if name in files:
            changed[name] = function(json.loads(files[name]), new_ids)
    result = {
        name: files[name] if name not in changed else dump(changed[name])
        for name in {**files, **changed}
        if name not in (SENTENCEPIECE_FILE, "vocab.txt")
    }
    if "vocab.txt" in files:
        own = [tokenizer.tokens[old] for old in new_ids if old not in tokenizer.beyond]
        result["vocab.txt"] = "".join(f"{token}\n" for token in own).encode()
    return result


def _tokenizer_json(tokenizer: TokenizerContent, new_ids: dict[int, int]) -> dict[str, Any]:
    content, own = tokenizer.content, [i for i in new_ids if i not in tokenizer.beyond]
    model = dict(content["model"])
    if tokenizer.kind == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in own]
        if tokenizer.unknown is not None:
            model["unk_id"] = new_ids[tokenizer.unknown]
    else:
        # In the order of the ids: transformers numbers word-level tokens as they come.
        model["vocab"] = {tokenizer.tokens[old]: new_ids[old] for old in own}
    added = [{**t, "id": new_ids[t["id"]]} for t in content.get("added_tokens") or []]
    changed = {
        "model": model,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "post_processor": _renumber_processor(content.get("post_processor"), new_ids),
    }
    if padding := content.get("padding"):
        changed["padding"] = {**padding, "pad_id": new_ids[padding["pad_id"]]}
    return {**content, **changed}


def _renumber_processor(
    processor: dict[str, Any] | None, new_ids: dict[int, int]
) -> dict[str, Any] | None:
    if processor is None:
        return None
    changed = dict(processor)
    for key in ("sep", "cls"):
        if key in processor:
            token, old = processor[key]
            changed[key] = [token, new_ids[old]]
    if "special_tokens" in processor:
        changed["special_tokens"] = {
            name: {**token, "ids": [new_ids[old] for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    if "processors" in processor:
        parts = processor["processors"]
        changed["processors"] = [_renumber_processor(part, new_ids) for part in parts]
    return changed


def _tokenizer_config(config: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    if "added_tokens_decoder" not in config:
        return config
    entries = config["added_tokens_decoder"].items()
    decoder = {new_ids[int(key)]: value for key, value in entries if int(key) in new_ids}
    return {**config, "added_tokens_decoder": {str(k): decoder[k] for k in sorted(decoder)}}


def _added_tokens(tokens: dict[str, int], new_ids: dict[int, int]) -> dict[str, int]:
    return {token: new_ids[old] for token, old in tokens.items() if old in new_ids}


def _map_json(
    tokenizer: TokenizerContent, files: Mapping[str, bytes], old_ids: np.ndarray
) -> dict[str, Any]:
    earlier = read_vocabulary_map(files)
    if earlier is None:
        return {"source_size": tokenizer.size, "old_ids": old_ids.tolist()}
    # Trimmed before: ids of the model that an index may have been built with.
    size = json.loads(files[MAP_FILE])["source_size"]
    return {"source_size": size, "old_ids": earlier[old_ids].tolist()}


def read_vocabulary_map(files: Mapping[str, bytes]) -> np.ndarray | None:
    """Old id of each new id of a trimmed model, ``None`` if its vocabulary is whole.

    The ids are those of the model that it was first trimmed from, shape ``(V',)``: to compare
    lexical weights with an older index.
    """
    if MAP_FILE not in files:
        return None
    return np.array(json.loads(files[MAP_FILE])["old_ids"], np.int64)
