"""Writing the model card of an extracted folder again, when more is known about the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bge_pruning.export.model_card import render_model_card
from bge_pruning.export.pruning_record import MARKER
from bge_pruning.model_io.hub import CARD
from bge_pruning.model_io.model_files import read_json
from bge_pruning.utils.files import write_text
from bge_pruning.utils.record_schemas import EVALUATION as EVALUATION_RECORD
from bge_pruning.utils.record_schemas import INDEX as INDEX_RECORD
from bge_pruning.utils.record_schemas import PRUNING
from bge_pruning.utils.records import COUNT, TEXT, Optional, check_record, read_record

log = logging.getLogger(__name__)

# Copies in the folder, which later cards are made from too.
EVALUATION = "evaluation.json"
INDEX = "index_compatibility.json"
# What each of them holds, and what writes it.
SCHEMAS = {
    EVALUATION: {
        **EVALUATION_RECORD,
        "model": TEXT,
        "parameters": EVALUATION_RECORD["parameters?"],
    },
    INDEX: INDEX_RECORD,
}
WRITERS = {EVALUATION: "evaluate_model.py", INDEX: "check_index_compatibility.py"}
# How each of them names the model.
NAMES = {EVALUATION: "model", INDEX: "new"}
PARTS = ("encoder", "embeddings", "pooler", "heads")


def write_model_card(
    folder: Path, evaluation: Path | None = None, index: Path | None = None
) -> Path:
    """Write ``README.md`` of an extracted folder from everything that is known about it.

    The files are copied into the folder. What was copied there before is used again.

    Args:
        folder: Folder that extraction wrote.
        evaluation: What ``scripts/evaluate_model.py`` wrote about it.
        index: What ``scripts/check_index_compatibility.py`` wrote about it.

    Returns:
        The path of ``README.md``.

    Raises:
        FileNotFoundError: If the folder holds no extracted model, or a file is not there.
        ValueError: If a file is damaged, is something else, or is about another model. Nothing is
            written then.
    """
    info = _read_info(folder)
    given = {EVALUATION: evaluation, INDEX: index}
    known = {name: _read(name, path, folder, info) for name, path in given.items()}
    try:
        card = render_model_card(info, known[EVALUATION], known[INDEX])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: the card cannot be made, something is missing in what is known about the "
            f"model ({error!r}). To fix, extract and evaluate it again with this version."
        ) from error
    for name, path in given.items():
        if path is not None and path.resolve() != (folder / name).resolve():
            write_text(folder / name, path.read_text(encoding="utf-8"))
    write_text(folder / CARD, card)
    log.info("wrote %s", folder / CARD)
    return folder / CARD


def _read_info(folder: Path) -> dict[str, Any]:
    if not (folder / MARKER).is_file():
        raise FileNotFoundError(
            f"{folder}: holds no {MARKER}, so it is no extracted model and its {CARD} is kept. To "
            f"fix, give the folder that scripts/extract_pruned_model.py wrote."
        )
    info = read_record(folder / MARKER, PRUNING, "extract the model again")
    # What sentence-transformers does; somebody may have changed it since the extraction.
    path = folder / "sentence_bert_config.json"
    settings = read_json(path, {})
    check_record(settings, {"max_seq_length?": Optional(COUNT)}, str(path), "copy it again")
    longest = settings.get("max_seq_length") or info.get("max_seq_length")
    return {**info, "max_seq_length": longest}


def _read(
    name: str, given: Path | None, folder: Path, info: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A file about the model: the one that was given, or the copy in the folder if there is one."""
    path = given or folder / name
    if given is None and not path.is_file():
        return None
    content = _read_record(path, name)
    if given is not None:  # the folder may have been moved since its copy was made
        _check_path(path, content[NAMES[name]], folder)
        if name == INDEX and Path(str(content.get("old"))).resolve() == folder.resolve():
            raise ValueError(
                f"{path}: compares the model with itself, which says nothing about an index of the "
                f"original. To fix, give the original as OLD to scripts/{WRITERS[INDEX]}."
            )
    if name == EVALUATION:
        _check_parameters(path, content, info)
    return content


def _read_record(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. To fix, check the path.")
    return read_record(
        path, SCHEMAS[name], f"give the JSON file that scripts/{WRITERS[name]} wrote"
    )


def _check_path(path: Path, model: Any, folder: Path) -> None:
    """Refuse what is about another folder that is there, or about a file in this one."""
    judged = Path(str(model))
    if judged.exists() and judged.resolve() != folder.resolve():
        raise ValueError(
            f"{path}: is about {judged}, not about {folder}. To fix, give a file that is about "
            f"{folder} itself."
        )


def _check_parameters(path: Path, evaluation: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    real = dict(info["parameters"]["extracted"])
    if "projection" in info:  # evaluation counts the map with the heads
        real["heads"] += info["projection"]["dimensions"] * info["shape"]["hidden_size"]
    judged = (evaluation["parameters"] or {}).get("model") or {}
    wrong = [
        f"{part} {judged.get(part, 0):,} (here {real[part]:,})"
        for part in PARTS
        if judged.get(part, 0) != real[part]
    ]
    if wrong:
        raise ValueError(
            f"{path}: is about a model with other parameters: {', '.join(wrong)}. To fix, evaluate "
            f"the model of this folder."
        )
