"""Fetching models from the Hugging Face hub: only the files that are read."""

from __future__ import annotations

import re
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentencepiece.bpe.model",
    "added_tokens.json",
    "vocab.txt",
    "vocab_map.json",  # of a trimmed model: it goes with the ids wherever they go
)
SMALL_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "2_Normalize/config.json",
    "3_Normalize/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "colbert_linear.pt",
    "sparse_linear.pt",
    "pruning.json",
    "README.md",  # names the licence
)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def is_hub_name(name: str) -> bool:
    """Whether a text has the form ``owner/name`` of a model on the hub."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name))


def fetch_model_folder(name: str, revision: str | None = None) -> Path:
    """Folder of a base model, downloaded from the hub if it is not a local folder.

    Args:
        name: Folder or hub name.
        revision: Hub revision.

    Returns:
        Folder with config, tokenizer, weights and, if there are any, heads.

    Raises:
        FileNotFoundError: If the name is neither a folder nor a hub name.
        OSError: If the hub cannot be reached or does not have the model.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        raise FileNotFoundError(
            f"base_model '{name}' is neither a folder nor a hub name (owner/name). To fix, check "
            f"the path; it is relative to {Path.cwd()}."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(SMALL_FILES)))
        if not any((folder / file).is_file() for file in WEIGHT_FILES):
            _download_weights(name, revision)
    except RepositoryNotFoundError as error:
        raise OSError(
            f"base_model '{name}' is neither a folder here nor a model on the hub. To fix, check "
            f"the name, or log in with 'hf auth login' if it is private."
        ) from error
    except Exception as error:  # the client also lets its HTTP library's errors through
        raise OSError(_no_network_message(name, error)) from error
    return folder


def _download_weights(name: str, revision: str | None) -> None:
    """The first kind of weight file that the model has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, WEIGHT_FILES[0], revision=revision)
    except EntryNotFoundError as error:
        # LocalEntryNotFoundError (not cached and offline) is an EntryNotFoundError too.
        if isinstance(error, LocalEntryNotFoundError):
            raise
        hf_hub_download(name, WEIGHT_FILES[1], revision=revision)


def _no_network_message(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"base_model '{name}' is not in the local cache and the hub did not deliver it ({reason}). "
        f"To fix, run once with a network connection, or fetch it elsewhere with 'hf download "
        f"{name} --local-dir FOLDER', copy it here and set model.base_model=FOLDER."
    )
