"""Tokenizer files as every tool reads them.

Training reads ``tokenizer.json`` as it is, and so do servers in Rust. transformers 5 takes the
vocabulary out of it and builds the rest (normalizer, splitting into words) anew for the classes
that it knows, so both are compared when a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bge_pruning.model_io.hub import quick_loading
from bge_pruning.model_io.model_files import ForeignModelError

log = logging.getLogger(__name__)

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
META = "▁"  # stands for the space before a word


def dump(content: Any) -> bytes:
    """JSON as tokenizer files hold it: short, and every script as it is."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def make_unigram_files(
    pieces: Sequence[tuple[str, float]], max_length: int, charsmap: bytes | None = None
) -> dict[str, bytes]:
    """Make XLM-R's fast tokenizer of pieces, by id, with their scores.

    The first four are the special tokens ``<s>``, ``<pad>``, ``</s>`` and ``<unk>``.
    ``charsmap`` is SentencePiece's compiled normalisation; without it, texts are not normalised.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    bos, pad, eos, unk = (piece for piece, _ in pieces[:4])
    tokenizer = Tokenizer(models.Unigram(list(pieces), unk_id=3, byte_fallback=False))
    if charsmap is not None:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    space = {"replacement": META, "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, 0), (eos, 2)],
    )
    added = [AddedToken(token, normalized=False) for token in (bos, pad, eos, unk)]
    tokenizer.add_special_tokens([*added, AddedToken("<mask>", lstrip=True, normalized=False)])
    names = {"bos": bos, "cls": bos, "eos": eos, "sep": eos, "pad": pad, "unk": unk}
    config = {f"{name}_token": token for name, token in {**names, "mask": "<mask>"}.items()}
    config |= {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": max_length}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": dump(config)}


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
    return {**files, "tokenizer_config.json": dump({**own, **changed})} if changed else files


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
    result = {**files, "tokenizer_config.json": dump(config)}
    if content.get("truncation") or content.get("padding"):
        result["tokenizer.json"] = dump({**content, "truncation": None, "padding": None})
    return result
