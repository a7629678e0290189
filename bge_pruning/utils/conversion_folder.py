"""Model folders that appear whole or not at all, and the record that tells a whole one.

Nothing here imports torch, so that a finished conversion is recognised in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

RECORD_FILE = "conversion.json"


def write_json(path: Path, content: object) -> None:
    """Write indented UTF-8 JSON with a final newline.

    Args:
        path: File to write.
        content: Anything that JSON can express.
    """
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compute_sha256(path: Path) -> str:
    """SHA-256 of a file.

    Args:
        path: File to read, in blocks of 1 MiB.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling folder that takes the name ``output`` when the block ends well.

    Args:
        output: The folder to make. Its parents are made as needed.
        overwrite: Replace an ``output`` that an earlier conversion left (it holds
            ``conversion.json``).

    Yields:
        The temporary folder, empty. It is removed if the block raises, and ``output`` stays as it
        was.

    Raises:
        FileExistsError: If ``output`` exists and may not be replaced.
    """
    _check_free(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    work, old = (
        output.with_name(f".{output.name}.{kind}-{mark}") for kind in ("partial", "replaced")
    )
    work.mkdir()
    try:
        yield work
        _check_free(output, overwrite)  # it may have appeared meanwhile
        if output.exists():
            output.rename(old)
        work.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)


def _check_free(output: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless ``output`` is free or may be replaced."""
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{output} already exists, expected a new folder. "
            "To fix, choose another output, or replace it with overwrite=True (--overwrite)."
        )
    if not (output / RECORD_FILE).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(
            f"{output} holds no {RECORD_FILE}, so it is no earlier conversion and is not "
            "overwritten. To fix, choose another output, or delete it yourself."
        )


def write_record(folder: Path, record: Mapping[str, object]) -> None:
    """Write ``conversion.json`` as the last file of a folder.

    Args:
        folder: Folder with all other files in place; their sizes in bytes go under ``files``.
        record: Further entries.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_json(folder / RECORD_FILE, {**record, "files": sizes})


def is_complete(folder: Path, source_sha256: str) -> bool:
    """Whether a folder holds a whole conversion of given weights.

    Args:
        folder: Folder to look at; it need not exist.
        source_sha256: Checksum of the source weights.

    Returns:
        True if the record names that checksum and every recorded file is there with its size.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        sizes = {folder / name: size for name, size in record["files"].items()}
        return record["source_sha256"] == source_sha256 and all(
            path.is_file() and path.stat().st_size == size for path, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no record, or one that another program wrote


def write_sentence_transformers_files(
    folder: Path, hidden_size: int, max_seq_length: int = 256
) -> None:
    """Write the classic sentence-transformers files: mean pooling, then L2 normalisation.

    By hand, because ``SentenceTransformer.save`` writes a newer format that lacks keys which
    text-embeddings-inference demands.

    Args:
        folder: Existing folder with the model.
        hidden_size: ``H``, the size of a sentence vector.
        max_seq_length: Texts are cut to this many tokens, special tokens included.
    """
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    pooling = {
        "word_embedding_dimension": hidden_size,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    for path, _ in kinds:
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": max_seq_length, "do_lower_case": False},
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
