"""Tokenizer files: which tokens they hold, which they refer to, and the files of fewer tokens.

Training reads ``tokenizer.json`` as it is, and so do servers in Rust. transformers 5 takes the
vocabulary out of it and builds the rest (normalizer, splitting into words) anew for the classes
that it knows, so both are compared when a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bge_pruning.model_io.hub import quick_loading
from bge_pruning.model_io.model_files import ForeignModelError

log = logging.getLogger(__name__)
KINDS = ("Unigram", "WordPiece", "WordLevel")
# For each id of a trimmed model, the id in the model that it was first cut from.
MAP_FILE = "vocab_map.json"
# Holds the untrimmed vocabulary, and some loaders prefer it to tokenizer.json.
SENTENCEPIECE_FILE = "sentencepiece.bpe.model"

# The class that reads tokenizer.json as it is; transformers 4 knows it by this name too.
PLAIN_CLASS = "PreTrainedTokenizerFast"
SPECIAL = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())
# What transformers copies from tokenizer.json's truncation and padding into tokenizer_config.json.
STORED_LENGTHS = (
    "max_length stride truncation_strategy pad_to_multiple_of pad_token_type_id".split()
)
# White space, cases, widths, marks that combine, scripts without spaces, what few vocabularies
# hold, and a text to be cut.
DIFFICULT = (
    "",
    "  two  spaces,\ttabs\n\nand lines  ",
    "A Plane, an AIR PLANE; ABCdef İı ẞß",
    "don't: U.S. 3.14, 1,024 (x_y) #tag @name a/b",
    "ＦＵＬＬ　Ｗｉｄｔｈ ﬁ ½ ㎏ Ⅳ é e\u0301 ñ",
    "a\u00a0b\u200bc\u200dd\ufeffe\u00adf",
    "Где находится ближайшая библиотека?",
    "今天的天气很好，我们去公园散步吧。日本語です 각 한국어",
    "السلام عليكم हिन्दी में ภาษาไทย",
    "🦜 👩‍👩‍👧 \ue000 𓀀 ▁under ▁ score",
    "one two three four five six seven eight nine ten " * 3,
)
CUT = 12


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
        name: files[name] if name not in changed else _dump(changed[name])
        for name in {**files, **changed}
        if name not in (SENTENCEPIECE_FILE, "vocab.txt")
    }
    if "vocab.txt" in files:
        own = [tokenizer.tokens[old] for old in new_ids if old not in tokenizer.beyond]
        result["vocab.txt"] = "".join(f"{token}\n" for token in own).encode()
    return result


def _dump(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


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


def complete_tokenizer_files(
    files: dict[str, bytes], folder: Path, pad_token_id: int
) -> dict[str, bytes]:
    """The tokenizer files of a folder with what transformers knows and they do not say.

    ``tokenizer_config.json`` names the class and every special token, also ``bos_token`` and
    ``eos_token``, which tools of BGE-M3 look for in WordPiece too. Where transformers would split
    texts in another way than ``tokenizer.json``, the class becomes the one that reads the file.

    Raises:
        ForeignModelError: If BERT's settings contradict ``tokenizer.json``.
        ValueError: If transformers cannot read the tokenizer, a special token is unknown, or the
            padding token has another id.
    """
    config = (folder / "config.json").read_bytes()
    digest = hashlib.sha256(b"".join([*(files[name] for name in sorted(files)), config]))
    class_name, special, found, difference = _read_as_transformers(folder, digest.hexdigest())
    missing = [name for name in ("cls_token", "eos_token", "pad_token") if name not in special]
    if missing:
        raise ValueError(
            f"{folder}: neither its files nor transformers say what the tokenizer's "
            f"{', '.join(missing)} is. To fix, name it in tokenizer_config.json."
        )
    if found != pad_token_id:
        raise ValueError(
            f"{folder}: config.json has pad_token_id {pad_token_id}, but the tokenizer's "
            f"{special['pad_token']} has the id {found}. To fix, use the tokenizer and the config "
            f"of the same model."
        )
    own = json.loads(files.get("tokenizer_config.json", b"{}"))
    names = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in own.items()
        if key in special
    }
    changed = {key: token for key, token in special.items() if token != names.get(key)}
    if difference is not None:
        _report_difference(folder, class_name, *difference)
        changed["tokenizer_class"] = PLAIN_CLASS
    elif "tokenizer_class" not in own:
        changed["tokenizer_class"] = class_name
    return {**files, "tokenizer_config.json": _dump({**own, **changed})} if changed else files


def _report_difference(
    folder: Path, class_name: str, text: str, theirs: tuple[str, ...], stored: tuple[str, ...]
) -> None:
    found = (
        f"{folder}: transformers takes the tokenizer for a {class_name} and splits {text!r} into "
        f"{' '.join(theirs)}, but tokenizer.json into {' '.join(stored)}"
    )
    # Every version of transformers puts BERT's settings above the file; of other classes, versions
    # before 5 read the file.
    if class_name.startswith("Bert"):
        raise ForeignModelError(
            f"{found}. To fix, make tokenizer_config.json (do_lower_case, strip_accents, "
            f"tokenize_chinese_chars) agree with tokenizer.json, or, if that is right, set "
            f'tokenizer_class to "{PLAIN_CLASS}" in it.'
        )
    log.warning(
        "%s; the file is right here, as it was before transformers 5: models written from this one "
        "name the class %s, so that all tools read it",
        found,
        PLAIN_CLASS,
    )


@lru_cache(maxsize=16)
def _read_as_transformers(
    folder: Path, digest: str
) -> tuple[str, dict[str, str], int | None, tuple | None]:
    """What transformers makes of a tokenizer; once for each content of the files.

    Returns:
        The class, the special tokens by their names, the id of the padding token, and the first
        text that it splits in another way than ``tokenizer.json`` with both ways.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        with quick_loading():
            theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not theirs.is_fast:
            raise ValueError(f"a {type(theirs).__name__} does not read tokenizer.json")
        difference = _find_difference(theirs, stored)
    except Exception as error:  # each class raises its own
        own = isinstance(error, ValueError | OSError)
        reason = str(error).strip().partition("\n")[0] if own else "a value of the wrong kind"
        raise ValueError(
            f"{folder}: transformers does not read the tokenizer ({reason}). To fix, copy the "
            f"model's own tokenizer files."
        ) from error
    special = {name: token for name, token in theirs.special_tokens_map.items() if name in SPECIAL}
    for name, other in (("bos_token", "cls_token"), ("eos_token", "sep_token")):
        if other in special:
            special.setdefault(name, special[other])
    name = type(theirs).__name__
    name = PLAIN_CLASS if name == "TokenizersBackend" else name
    padding = stored.token_to_id(special.get("pad_token", ""))
    return name, special, padding, difference


def _find_difference(theirs: Any, stored: Any) -> tuple | None:
    stored.no_padding()
    for length in (None, CUT):
        stored.no_truncation() if length is None else stored.enable_truncation(length)
        options = {"truncation": length is not None, "max_length": length, "verbose": False}
        for text in DIFFICULT:
            first, second = theirs(text, **options)["input_ids"], stored.encode(text)
            if first != second.ids:
                return text, tuple(theirs.convert_ids_to_tokens(first)), tuple(second.tokens)
    return None


def write_for_tools(files: Mapping[str, bytes], max_length: int) -> dict[str, bytes]:
    """Tokenizer files with which every tool cuts texts at the model's own length, and pads none.

    Readers in Rust follow the truncation and padding in ``tokenizer.json`` (all-MiniLM-L6-v2
    stores 128 tokens); others, asked to cut, cut at ``model_max_length``, or fail where it lacks.
    """
    content = json.loads(files.get("tokenizer.json", b"{}"))
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    config = {key: value for key, value in config.items() if key not in STORED_LENGTHS}
    config["model_max_length"] = max_length
    # One type of tokens: a second text of a pair would have none.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    result = {**files, "tokenizer_config.json": _dump(config)}
    if content.get("truncation") or content.get("padding"):
        result["tokenizer.json"] = _dump({**content, "truncation": None, "padding": None})
    return result
