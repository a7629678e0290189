"""Read the files beside a model's weights: config, pooling, prompts and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bge_pruning.model_io import bert_conversion
from bge_pruning.model_io.hub import TOKENIZER_FILES, encoder_folder
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.utils.json_records import (
    Count,
    Flag,
    Record,
    Text,
    kind_of,
    parse_json,
    parse_record,
    show,
)

# The largest value accepted for each: a damaged file must not build 10^12 layers.
SIZES = {
    "hidden_size": 65_536,
    "num_attention_heads": 4096,
    "num_hidden_layers": 1000,
    "intermediate_size": 1 << 20,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 10_000_000,
}
# Names of the prompt of a query, of a passage, and of a text that is neither.
PROMPT_NAMES = {"query": ("query",), "passage": ("document", "passage", "corpus"), "text": ()}
# A text that few tokenizers split as they split it in lower case.
CASED = "A Plane, an AIR PLANE"
# What transformers takes for keys that a config leaves out.
CONFIG_DEFAULTS = {"type_vocab_size": 2, "pad_token_id": 1, "layer_norm_eps": 1e-12}


class ForeignModelError(ValueError):
    """Dense vectors of this model are not what this project would compute."""


def _is_token(value: Any) -> bool:
    """A token of ``tokenizer_config.json`` is its text, or an object that holds it."""
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


Token = Annotated[Any, kind_of("a text", lambda value: value is None or _is_token(value))]


class Prompts(Record):
    """What to write before a text, of ``config_sentence_transformers.json``."""

    prompts: dict[str, Text] | None = None
    default_prompt_name: Text | None = None


class _Settings(Record):
    max_seq_length: Count | None = None
    do_lower_case: Flag = False


class _SpecialTokens(Record):
    bos_token: Token = None
    cls_token: Token = None
    eos_token: Token = None
    sep_token: Token = None
    pad_token: Token = None
    unk_token: Token = None
    mask_token: Token = None


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read and check ``config.json`` of an XLM-R encoder, or of a BERT encoder as XLM-R.

    Raises:
        FileNotFoundError: If there is none.
        ForeignModelError: If it is another kind of encoder.
        ValueError: If a value is wrong.
    """
    path = encoder_folder(folder) / "config.json"
    config = read_json(path)
    default = {"position_embedding_type": "absolute"}
    bert = config.get("model_type") == "bert"
    given = {**default, "is_decoder": False, **config}
    wanted = {"model_type": "bert" if bert else "xlm-roberta", "hidden_act": "gelu", **default}
    for key, value in {**wanted, **({"is_decoder": False} if bert else {})}.items():
        if given.get(key) != value:
            raise ForeignModelError(
                f"{path}: {key} is {given.get(key)!r}, expected {value!r}. To fix, choose an "
                f"XLM-RoBERTa encoder such as BAAI/bge-m3, or a BERT encoder with absolute "
                f"positions."
            )
    _check_sizes(config, path)
    if bert:
        config = bert_conversion.convert_config(config, _read_padding_id(path.parent))
    config = {**CONFIG_DEFAULTS, **config}
    _check_details(config, path)
    return config


def _read_padding_id(folder: Path) -> int:
    """Id of the tokenizer's padding token, which may be another than the ``config.json`` of BERT.

    BERT computes nothing with it, while XLM-R's positions depend on it.
    """
    names = [*bert_conversion.PADDING]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        token = parse_record(read_json(path, {}), _SpecialTokens, str(path), "copy it again")
        pad = token.pad_token
        names = [pad["content"] if isinstance(pad, dict) else pad, *names]
    added = read_json(folder / "tokenizer.json", {}).get("added_tokens")
    tokens = [t for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    ids = {str(token.get("content")): token.get("id") for token in tokens}
    found = next((ids[name] for name in names if name in ids), None)
    if type(found) is not int:
        raise ForeignModelError(
            f"{folder}: there is no tokenizer.json with a padding token, after which the positions "
            f"of XLM-R are counted. To fix, save the model's fast tokenizer there, and name "
            f"pad_token in tokenizer_config.json."
        )
    return found


def _check_sizes(config: dict[str, Any], path: Path) -> None:
    if missing := [key for key in SIZES if key not in config]:
        raise ValueError(
            f"{path}: lacks {', '.join(missing)}. To fix, copy the model's own config.json."
        )
    for key, limit in SIZES.items():
        if type(config[key]) is not int or not 1 <= config[key] <= limit:
            raise ValueError(
                f"{path}: {key} is {show(config[key])}, expected a number of 1 or more, at most "
                f"{limit:,}. To fix, copy the model's own config.json."
            )
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ValueError(
            f"{path}: hidden_size {config['hidden_size']} is not a multiple of "
            f"num_attention_heads {config['num_attention_heads']}. To fix, copy the model's own "
            f"config.json."
        )


def _check_details(config: dict[str, Any], path: Path) -> None:
    """Check the fields that have defaults."""
    # Positions begin behind the padding token's, which is a row of the word table.
    last = min(config["max_position_embeddings"] - 2, config["vocab_size"] - 1)
    ranges = {
        "type_vocab_size": (int, lambda v: 1 <= v <= 1000, "a number from 1 to 1000"),
        "pad_token_id": (int, lambda v: 0 <= v <= last, f"an id up to {last:,}"),
        "layer_norm_eps": (float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    }
    for key, (kind, holds, expected) in ranges.items():
        value = config[key]
        if type(value) not in (int, kind) or not holds(value):
            raise ValueError(
                f"{path}: {key} is {show(value)}, expected {expected}. To fix, copy the model's "
                f"own config.json."
            )


def shape_from_config(
    config: dict[str, Any], pooler: bool, sparse_head: bool, colbert_dim: int
) -> EncoderShape:
    """Sizes named by an XLM-R ``config.json``."""
    return EncoderShape(
        **{key: config[key] for key in (*SIZES, "type_vocab_size")},
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        pooler=pooler,
        sparse_head=sparse_head,
        colbert_dim=colbert_dim,
    )


def read_pooling(folder: Path) -> str:
    """Pooling named by the folder's sentence-transformers files, ``"cls"`` if there are none."""
    check_prompts_are_pooled(folder)
    path = folder / "1_Pooling" / "config.json"
    config = read_json(path, {})
    named = [k for k, v in config.items() if k.startswith("pooling_mode_") and v]
    if "pooling_mode" in config:
        named.append(f"pooling_mode_{config['pooling_mode']}")
    poolings = {
        (): "cls",
        ("pooling_mode_cls_token",): "cls",
        ("pooling_mode_cls",): "cls",
        ("pooling_mode_mean_tokens",): "mean",
        ("pooling_mode_mean",): "mean",
    }
    if tuple(named) not in poolings:
        raise ForeignModelError(
            f"{path}: pooling is {', '.join(named)}, expected cls or mean. To fix, set "
            f"model.pooling to the one that the model was trained with, or choose another model."
        )
    return poolings[tuple(named)]


def check_prompts_are_pooled(folder: Path) -> None:
    """Refuse a model whose dense vectors leave the tokens of a prompt out.

    Raises:
        ValueError: If its sentence-transformers files say so.
    """
    path = folder / "1_Pooling" / "config.json"
    if not (given := read_json(path, {}).get("include_prompt", True)):
        raise ValueError(
            f"{path}: include_prompt is {show(given)}: sentence-transformers leaves the tokens of "
            f"a prompt out of the dense vector, which is not done here. To fix, set it to true to "
            f"have them in it, or choose another model."
        )


def read_max_seq_length(folder: Path, config: dict[str, Any]) -> int:
    """Longest text in tokens that the folder's files name, limited by the number of positions.

    Like sentence-transformers, which asks the tokenizer where no file of its own is.
    """
    folder = encoder_folder(folder)
    longest = _read_settings(folder).max_seq_length
    if not longest:
        longest = read_json(folder / "tokenizer_config.json", {}).get("model_max_length")
    # Positions start at pad_token_id + 1.
    positions = config["max_position_embeddings"] - config["pad_token_id"] - 1
    return min(longest, positions) if type(longest) is int and longest > 0 else positions


def _read_settings(folder: Path) -> _Settings:
    path = folder / "sentence_bert_config.json"
    return parse_record(read_json(path, {}), _Settings, str(path), "copy it again")


def read_prompts(folder: Path) -> dict[str, Any]:
    """Read the prompts that sentence-transformers writes before a text.

    Raises:
        ValueError: If the default prompt is none of them.
    """
    path = folder / "config_sentence_transformers.json"
    config = parse_record(read_json(path, {}), Prompts, str(path), "copy it again")
    prompts, default = config.prompts or {}, config.default_prompt_name
    if default is not None and default not in prompts:
        raise ValueError(
            f"{path}: default_prompt_name is {show(default)}, which is none of prompts "
            f"({', '.join(prompts) or 'empty'}): sentence-transformers does not load such a "
            f"folder. To fix, add that prompt, or set default_prompt_name to null."
        )
    return {"prompts": prompts, "default_prompt_name": default}


def find_prompt(config: Mapping[str, Any], role: str, tasks: Sequence[str] = ()) -> str:
    """What a model's files say is written before a text, "" if that is nothing.

    A prompt may be named after the role as sentence-transformers does it, or after a task as mteb
    does it, with the role (``Retrieval-query``) or without (``STS``). Otherwise a text without a
    role has the default prompt; sentence-transformers gives no other text that. Of several names
    for passages the first one counts that is not empty: sentence-transformers saves an empty
    ``document`` beside the ``passage`` of other tools.

    Args:
        config: As :func:`read_prompts` gives it; what it has under ``given``, by role, comes first.
        role: ``query``, ``passage``, or ``text`` for a text that is neither.
        tasks: Names of the task, the most special first, such as its own and that of its type. A
            name such as ``query``, of a local file or folder, is no task's.
    """
    if role in (given := config.get("given") or {}):
        return given[role]
    prompts, names = config.get("prompts") or {}, PROMPT_NAMES[role]
    roles = {"", *chain.from_iterable(PROMPT_NAMES.values())}
    for task in (*(task for task in tasks if task not in roles), ""):
        of_role = [f"{task}-{name}" if task else name for name in names]
        for choice in (of_role, [task] if task else []):
            if found := [prompts[name] for name in choice if name in prompts]:
                return next(filter(None, found), "")
    return prompts.get(config.get("default_prompt_name"), "") if role == "text" else ""


def read_tokenizer_files(folder: Path, vocab_size: int) -> dict[str, bytes]:
    """Contents of the tokenizer files by name."""
    folder = encoder_folder(folder)
    settings = folder / "tokenizer_config.json"
    parse_record(read_json(settings, {}), _SpecialTokens, str(settings), "copy it again")
    files = {f: (folder / f).read_bytes() for f in TOKENIZER_FILES if (folder / f).is_file()}
    path = folder / "tokenizer.json"
    if path.name not in files:
        raise FileNotFoundError(
            f"{folder}: has no tokenizer.json, which every server needs. To fix, save the model's "
            f"fast tokenizer there."
        )
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(files[path.name].decode("utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path}: is not a tokenizer ({error}). To fix, copy it again.") from error
    cased, lower = (tokenizer.encode(text).ids for text in (CASED, CASED.lower()))
    if _read_settings(folder).do_lower_case and cased != lower:
        raise ForeignModelError(
            f"{folder}: sentence-transformers writes texts in lower case (do_lower_case of "
            f"sentence_bert_config.json), tokenizer.json does not. To fix, add a Lowercase "
            f"normalizer to tokenizer.json, or set do_lower_case to false."
        )
    # Ids, not their number: one of few tokens may lie beyond the table.
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {size} tokens but the embeddings have {vocab_size} rows. "
            f"To fix, use the tokenizer and the weights of the same model."
        )
    return files


def read_vocabulary(tokenizer_files: dict[str, bytes]) -> dict[str, int]:
    """Id of every token of a ``tokenizer.json``."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_files["tokenizer.json"].decode("utf-8")).get_vocab()


def read_special_ids(tokenizer_files: dict[str, bytes]) -> set[int]:
    """Ids that carry no sparse weight, as FlagEmbedding: cls, eos, pad and unk."""
    config = json.loads(tokenizer_files.get("tokenizer_config.json", b"{}"))
    vocabulary = read_vocabulary(tokenizer_files)
    tokens = [config.get(f"{name}_token") for name in ("cls", "eos", "pad", "unk")]
    contents = [t.get("content") if isinstance(t, dict) else t for t in tokens]
    return {vocabulary[token] for token in contents if token in vocabulary}


def read_edge_ids(tokenizer_files: dict[str, bytes]) -> dict[str, int]:
    """Ids of the first and the last token of a text, as ``config.json`` names them."""
    config, ids = json.loads(tokenizer_files["tokenizer_config.json"]), {}
    vocabulary = read_vocabulary(tokenizer_files)
    for name in ("bos_token", "eos_token"):
        token = config[name]
        ids[f"{name}_id"] = vocabulary[token["content"] if isinstance(token, dict) else token]
    return ids


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> ValueError:
    """The error of a file that a library cannot read."""
    return ValueError(f"{path}: damaged or not complete ({error}). To fix, copy it again.")


def read_json(path: Path, default: Any = ...) -> Any:
    """A JSON object, or the default if there is no file."""
    if not path.is_file():
        if default is ...:
            raise FileNotFoundError(f"{path}: no such file. To fix, choose a model folder.")
        return default
    content = parse_json(path.read_bytes(), str(path), "copy it again")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object. To fix, copy it again.")
    return content
