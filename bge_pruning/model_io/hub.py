"""Models from the Hugging Face hub: fetch them, load them quietly, and read their origin."""

from __future__ import annotations

import functools
import gc
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bge_pruning.utils.json_records import Record, Text, read_record
from bge_pruning.utils.records import Source
from bge_pruning.utils.run_log import log_hub

# The last one is of a trimmed model: it goes with the ids wherever they go.
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json sentencepiece.bpe.model "
    "added_tokens.json vocab.txt vocab_map.json"
).split()
# README.md names the licence.
SMALL_FILES = (
    *TOKENIZER_FILES,
    *"config.json modules.json sentence_bert_config.json config_sentence_transformers.json".split(),
    *"1_Pooling/config.json 2_Dense/config.json 2_Dense/model.safetensors".split(),
    *"2_Normalize/config.json 3_Normalize/config.json colbert_linear.pt sparse_linear.pt".split(),
    *"pruning.json README.md adapter_config.json".split(),
)
# One file, or the list of a model's shards, in the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json"
).split()
# Old versions of sentence-transformers put the encoder's own files here.
INNER = "0_Transformer"


def is_hub_name(name: str) -> bool:
    """Whether a text has the form ``owner/name`` of a model on the hub."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name))


def encoder_folder(folder: Path) -> Path:
    """Where config, weights and tokenizer of a model folder lie: mostly the folder itself."""
    return folder / INNER if (folder / INNER / "config.json").is_file() else folder


def fetch_model_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder of a base model, downloaded from the hub if it is not local.

    Raises:
        FileNotFoundError: If the name is neither a folder nor a hub name.
        OSError: If the hub cannot be reached or does not have the model.
        ValueError: If it is an adapter, alone or beside full weights.
    """
    folder = Path(name) if Path(name).is_dir() else _download(name, revision)
    refuse_adapter(folder)
    return folder


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder that holds a PEFT adapter, alone or beside full weights."""
    path = encoder_folder(folder) / "adapter_config.json"
    if not path.is_file():
        return
    base = read_record(path, _Adapter, "copy it again").base_model_name_or_path
    beside = " To use the weights beside it alone, remove adapter_config.json."
    also = beside if weight_paths(path.parent) else ""
    raise ValueError(
        f"{path}: the folder holds a PEFT adapter of {base or 'another model'}, which would not be "
        f"applied here. To fix, merge it: peft.AutoPeftModel.from_pretrained(FOLDER)."
        f"merge_and_unload().save_pretrained(NEW), with the tokenizer's files, and name the new "
        f"folder.{also}"
    )


@functools.cache
def _download(name: str, revision: str | None) -> Path:
    """Once in a process, in which the newest revision stays the same; errors are not kept."""
    if not is_hub_name(name):
        raise FileNotFoundError(
            f"base_model '{name}' is neither a folder nor a hub name (owner/name). To fix, check "
            f"the path; it is relative to {Path.cwd()}."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    log_hub(name)
    files = [*SMALL_FILES, *(f"{INNER}/{file}" for file in SMALL_FILES)]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
        inner = f"{INNER}/" if encoder_folder(folder) != folder else ""
        paths = weight_paths(encoder_folder(folder))
        if not paths or not all(path.is_file() for path in paths):
            _download_weights(name, revision, inner)
    except RepositoryNotFoundError as error:
        raise OSError(
            f"base_model '{name}' is neither a folder here nor a model on the hub. To fix, check "
            f"the name, or log in with 'hf auth login' if it is private."
        ) from error
    except Exception as error:  # the client also lets its HTTP library's errors through
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(
            f"base_model '{name}' is not in the local cache and the hub did not deliver it "
            f"({reason}). To fix, run once with a network connection, or fetch it elsewhere with "
            f"'hf download {name} --local-dir FOLDER', copy it here and set "
            f"model.base_model=FOLDER."
        ) from error
    return folder


def weight_paths(folder: Path) -> list[Path]:
    """The files of a model's weights, of which shards may be missing; none if it has none."""
    path = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    return [] if path is None else shards(path)


def shards(path: Path) -> list[Path]:
    """The files that a file of ``WEIGHT_FILES`` stands for; they lie beside it."""
    if path.suffix != ".json":
        return [path]
    index = read_record(path, _ShardIndex, "copy it again")
    return [path.with_name(Path(name).name) for name in sorted(set(index.weight_map.values()))]


class _ShardIndex(Record):
    weight_map: dict[str, Text]


class _Adapter(Record):
    base_model_name_or_path: Text | None = None


def _download_weights(name: str, revision: str | None, inner: str) -> None:
    """Download the first kind of weight files that the model has; none if it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in WEIGHT_FILES:
        try:
            path = Path(hf_hub_download(name, f"{inner}{file}", revision=revision))
        except EntryNotFoundError as error:
            # LocalEntryNotFoundError (not cached and offline) is an EntryNotFoundError too.
            if isinstance(error, LocalEntryNotFoundError):
                raise
            continue
        for shard in shards(path):
            if shard != path:
                hf_hub_download(name, f"{inner}{shard.name}", revision=revision)
        return


log = logging.getLogger(__name__)
CARD = "README.md"
# Licence identifiers of the hub: mit, apache-2.0, cc-by-4.0, other, ...
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, as far as its card says; a local folder names its base."""

    license: str | None = None
    name: str | None = None


def read_origin(folder: Path, name: str) -> Origin:
    """Licence and hub name of a model, as far as they are known.

    A damaged card is a warning, never an error: training needs none of it.
    """
    card = _read_card(folder / CARD)
    license_id = _as_license(card.get("license"), folder / CARD)
    # A folder here may have the name of a model on the hub; the folder is what is read.
    if not Path(name).is_dir() and is_hub_name(name):
        return Origin(license_id, name)
    return Origin(license_id, _as_hub_name(card.get("base_model")))


def _read_card(path: Path) -> dict[str, Any]:
    """The metadata at the head of a model card; empty if there are none."""
    from huggingface_hub import metadata_load

    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, OSError, yaml.YAMLError) as error:  # no dictionary, no text, no YAML
        reason = " ".join(str(error).split())
        log.warning("%s: the metadata of the model card cannot be read (%s)", path, reason)
        return {}


def _as_license(value: Any, path: Path) -> str | None:
    only = _single(value)
    if only is None or (isinstance(only, str) and LICENSE.fullmatch(only)):
        return only
    log.warning("%s: license is %r, expected one identifier such as mit", path, value)
    return None


def _as_hub_name(value: Any) -> str | None:
    only = _single(value)
    return only if isinstance(only, str) and is_hub_name(only) else None


def _single(value: Any) -> Any:
    """Unwrap a list of one: the hub also accepts lists, and longer ones are ambiguous."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def hub_name(source: Source) -> str | None:
    """Hub name of the model that another was cut from, ``None`` if it has none."""
    if source.origin:
        return source.origin
    name = source.base_model
    return name if is_hub_name(name) and not Path(name).is_dir() else None


def display_name(source: Source) -> str:
    """Hub name, or the last part of a path: local paths are not published."""
    return hub_name(source) or Path(source.base_model).name


def hub_page(name: str) -> str:
    """Address of a model's page."""
    return f"https://huggingface.co/{name}"


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Switch off transformers' progress bars, and its reports of weights that a model ignores."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    reports = logging.getLogger("transformers.modeling_utils")
    reports.addFilter(_matters)
    try:
        yield
    finally:
        reports.removeFilter(_matters)
        if shown:
            hf_logging.enable_progress_bar()


def _matters(record: logging.LogRecord) -> bool:
    """Whether a line is more than a report of weights without a place, such as those of a head.

    A pooler may be missing as well: no output of an embedding model is computed with it.
    """
    text = record.getMessage()
    rows = [row for row in text.splitlines() if "|" in row and not row.startswith("pooler.")]
    wrong = ("MISSING", "MISMATCH", "CONVERS")
    return "LOAD REPORT" not in text or any(word in row for row in rows for word in wrong)


@contextmanager
def quick_loading() -> Iterator[None]:
    """Switch off progress bars and Python's garbage collector while a model is loaded.

    A tokenizer of 250,002 tokens is read as that many lists. The collector would scan them again
    and again, which takes longer than reading them.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with no_loading_bars():
            yield
    finally:
        if collects:
            gc.enable()
