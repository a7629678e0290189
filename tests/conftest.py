"""A tiny random XLM-R model folder, a tiny data set and a configuration that trains on them."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before torch is imported: tensors are tiny here, and threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.common.hub", "tests.common.models", "tests.common.runs"]

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
WORDS = (
    "a the man woman dog cat child plane plays eats runs reads sings cuts rides is on in of with "
    "guitar flute apple horse bread song book house park street water sky red small old fast "
    "slowly loudly here there today never and not two three"
).split()
ROWS = 40
COLLECTION_WORDS = (
    "the man woman dog cat child park plays reads eats rides guitar red book horse fast".split()
)

YAML = """\
run_name: tiny
seed: 3
max_duration: 4ba
eval_interval: 2ba
save_interval: 2ba
log_interval: 1ba
global_train_batch_size: 8
eval_batch_size: 8
device: cpu
progress_bar: false
run_folder: {folder}/runs/${{run_name}}
results_folder: {folder}/results/${{run_name}}
model:
  base_model: {model}
  max_length: 16
  l0_module:
    target_model: {{d_model: 24, n_heads: 3, n_layers: 3, intermediate_size: 48}}
    lagrangian_warmup_steps: 0.5dur
data:
  processed_folder: {folder}/processed
  train:
    - {{name: train, kind: sts, path: {csv}}}
  eval:
    - {{name: dev, kind: sts, path: {csv}}}
loss: {{sts_regression: 1.0, distillation_alignment: 1.0, distillation_similarity: 1.0}}
optimizer: {{lr: 1.0e-3}}
scheduler: {{t_warmup: 1ba}}
loggers: {{folder: {folder}/logs}}
"""


class _Raise(logging.Handler):
    """Turns a warning into an error."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


GUARD = logging.getLogger("bge_pruning.utils.guard")
RAISE = _Raise(level=logging.WARNING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU, compilers and communication warn of their own parts: no error of this project."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session", autouse=True)
def no_hidden_failures() -> Iterator[None]:
    """What may fail without ending a run (reports, pictures, uploads) fails the test."""
    GUARD.addHandler(RAISE)
    yield
    GUARD.removeHandler(RAISE)


@pytest.fixture
def failures_may_be_hidden() -> Iterator[None]:
    """This test looks at how such a failure is reported."""
    GUARD.removeHandler(RAISE)
    yield
    GUARD.addHandler(RAISE)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XLM-R with L=4, A=4, H=32, F=64, V=99, both heads and cls pooling; do not write into it."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    folder = tmp_path_factory.mktemp("base") / "tiny-xlmr"
    config = XLMRobertaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=130,
        type_vocab_size=1,
        initializer_range=0.3,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        XLMRobertaModel(config).save_pretrained(folder)
        torch.save(torch.nn.Linear(32, 32).state_dict(), folder / "colbert_linear.pt")
        torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    _write_tokenizer(folder)
    _write_sentence_transformers_files(folder)
    return folder


@pytest.fixture(scope="session")
def write_projected(model_folder: Path) -> Callable[..., Path]:
    """A function that copies the tiny model into a new folder, with a map of its dense vectors."""
    import shutil

    from bge_pruning.model_io.model_folder import write_sentence_transformers_files

    def write(folder: Path, projection: object) -> Path:
        written = ("modules.json", "?_*", "sentence_bert_config.json")
        shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns(*written))
        write_sentence_transformers_files(folder, "cls", 32, 128, projection=projection)
        return folder

    return write


@pytest.fixture(scope="session")
def projected_folder(
    tmp_path_factory: pytest.TempPathFactory, write_projected: Callable[..., Path]
) -> Path:
    """The tiny model with dense vectors of 40 dimensions; do not write into it."""
    import torch

    projection = torch.randn(40, 32, generator=torch.Generator().manual_seed(4))
    return write_projected(tmp_path_factory.mktemp("projected") / "tiny-projected", projection)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokens = [*SPECIAL_TOKENS, *WORDS]
    tokenizer = Tokenizer(WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    tokenizer_class = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}
    _write_json(folder / "tokenizer_config.json", {**special, **tokenizer_class})


def _write_sentence_transformers_files(folder: Path) -> None:
    names = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{name}"}
        for n, (path, name) in enumerate(names.items())
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": 32,
            "pooling_mode_cls_token": True,
            "pooling_mode_mean_tokens": False,
        },
    )
    _write_json(folder / "2_Normalize" / "config.json", {})
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False}
    )


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def sts_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty scored pairs of 2 to 12 known words, without a header."""
    import numpy as np

    generator = np.random.default_rng(5)

    def sentence() -> str:
        return " ".join(generator.choice(WORDS, generator.integers(2, 13)))

    path = tmp_path_factory.mktemp("data") / "tiny.csv"
    rows = [f"{sentence()},{sentence()},{generator.uniform(0, 5):.2f}" for _ in range(ROWS)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def contrastive_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty queries with one or two positives and two negatives; some share a positive."""
    import numpy as np

    generator = np.random.default_rng(8)

    def sentence() -> str:
        return " ".join(generator.choice(WORDS, generator.integers(2, 9)))

    passages = [sentence() for _ in range(30)]
    rows = [
        {
            "query": sentence(),
            "pos": list(generator.choice(passages, generator.integers(1, 3), replace=False)),
            "neg": [sentence(), sentence()],
        }
        for _ in range(ROWS)
    ]
    path = tmp_path_factory.mktemp("data") / "tiny.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def write_collection() -> Callable[..., Path]:
    """A function that writes a collection of ``count`` passages, a query for every second one."""

    import numpy as np

    def write(folder: Path, count: int = 30, seed: int = 1) -> Path:
        generator = np.random.default_rng(seed)
        (folder / "qrels").mkdir(parents=True)

        def sentence() -> str:
            return " ".join(generator.choice(COLLECTION_WORDS, generator.integers(3, 9)))

        corpus = [{"_id": f"d{i}", "title": "", "text": sentence()} for i in range(count)]
        corpus[0]["title"] = "a title"
        queries = [
            {"_id": f"q{i}", "text": " ".join(corpus[i]["text"].split()[:3])}
            for i in range(0, count, 2)
        ]
        for name, rows in (("corpus", corpus), ("queries", queries)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text)
        lines = [f"q{i}\td{i}\t1" for i in range(0, count, 2)] + ["q0\td1\t2", "q2\td3\t0"]
        header = "query-id\tcorpus-id\tscore"
        (folder / "qrels" / "test.tsv").write_text("\n".join([header, *lines]) + "\n")
        return folder

    return write


@pytest.fixture(scope="session")
def collection(
    tmp_path_factory: pytest.TempPathFactory, write_collection: Callable[..., Path]
) -> Path:
    """Thirty passages, fifteen judged queries; do not write into it."""
    return write_collection(tmp_path_factory.mktemp("retrieval") / "tiny")


@pytest.fixture(scope="session")
def make_yaml(model_folder: Path, sts_csv: Path) -> Callable[[Path], Path]:
    """A function that writes ``tiny.yaml`` into a folder, which it trains in."""

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "tiny.yaml"
        text = YAML.format(folder=folder, model=model_folder, csv=sts_csv)
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def tiny_yaml(make_yaml: Callable[[Path], Path], tmp_path: Path) -> Path:
    """Four steps of pruning on the tiny model, in this test's folder."""
    return make_yaml(tmp_path)


@pytest.fixture(scope="session")
def token_texts():
    """Forty texts of 3 to 20 tokens; no token is padding."""
    import numpy as np

    from bge_pruning.datasets.embedding_dataset import TokenizedTexts

    generator = np.random.default_rng(2)
    lengths = generator.integers(3, 21, 40)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return TokenizedTexts(generator.integers(4, 60, starts[-1]).astype(np.int32), starts, 0)


@pytest.fixture(scope="session")
def train_tiny(make_yaml: Callable[[Path], Path]) -> Callable[..., Path]:
    """A function ``(folder, *overrides)`` that trains in a folder and returns the run folder.

    The report takes longer than the training: ``report=True`` writes it.
    """
    from bge_pruning.config.load import load_config
    from bge_pruning.train import train
    from bge_pruning.training import run_report

    def run(folder: Path, *overrides: str, report: bool = False) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            if not report:
                patch.setattr(run_report, "write_report", lambda *_, **__: None)
            return train(load_config([make_yaml(folder)], overrides))

    return run


@pytest.fixture(scope="session")
def load_state() -> Callable[[Path], dict]:
    """A function that reads the newest checkpoint of a run, or a checkpoint file."""
    import torch

    from bge_pruning.model_io.checkpoint import PLAIN_TYPES, find_checkpoint

    def load(path: Path) -> dict:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            return torch.load(find_checkpoint(path), weights_only=True)["state"]

    return load


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """A function that compares nested tensors, exactly or within a tolerance."""
    import numpy as np
    import torch

    def same(a: object, b: object, atol: float = 0.0, where: str = "") -> None:
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                same(a[key], b[key], atol, f"{where}.{key}")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), where
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                same(x, y, atol, f"{where}[{index}]")
        elif isinstance(a, torch.Tensor | np.ndarray):
            a, b = torch.as_tensor(a), torch.as_tensor(b)
            assert torch.allclose(a, b, rtol=0.0, atol=atol), (
                f"{where} differs by {(a - b).abs().max()}"
            )
        else:
            assert a == b, f"{where}: {a!r} != {b!r}"

    return same
