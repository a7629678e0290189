"""A tiny random XLM-R model folder and tiny data sets in every layout."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
WORDS = (
    "a the man woman dog cat child plane plays eats runs reads sings cuts rides is on in of with "
    "guitar flute apple horse bread song book house park street water sky red small old fast "
    "slowly loudly here there today never and not two three"
).split()
ROWS = 40
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.3}
COLLECTION_WORDS = (
    "the man woman dog cat child park plays reads eats rides guitar red book horse fast".split()
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XLM-R with L=4, A=4, H=32, F=64, V=99, both heads and cls pooling; do not write into it."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    folder = tmp_path_factory.mktemp("base") / "tiny-xlmr"
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "type_vocab_size": 1}
    sizes = {"num_hidden_layers": 4, "intermediate_size": 64, "max_position_embeddings": 130}
    config = XLMRobertaConfig(**SIZES, **sizes, **tokens)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        XLMRobertaModel(config).save_pretrained(folder)
        torch.save(torch.nn.Linear(32, 32).state_dict(), folder / "colbert_linear.pt")
        torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    for name, content in word_tokenizer(WORDS, 128).items():
        (folder / name).write_bytes(content)
    _write_sentence_transformers_files(folder)
    return folder


@pytest.fixture(scope="session")
def write_projected(model_folder: Path) -> Callable[..., Path]:
    """A function that copies the tiny model into a new folder, with a map of its dense vectors."""
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


@pytest.fixture(scope="session")
def small_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first half of the layers of the model: what pruning could have left."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("small") / "small-xlmr"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    gone = ("encoder.layer.2.", "encoder.layer.3.")
    kept = {key: value for key, value in weights.items() if not key.startswith(gone)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def electra_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ELECTRA model in sentence-transformers' layout, with mean pooling and the same words."""
    import torch
    from transformers import ElectraConfig, ElectraModel

    folder = tmp_path_factory.mktemp("electra") / "tiny-electra"
    shutil.copytree(model_folder, folder)
    for name in ("colbert_linear.pt", "sparse_linear.pt", "model.safetensors", "config.json"):
        (folder / name).unlink()
    sizes = {"num_hidden_layers": 1, "intermediate_size": 48, "max_position_embeddings": 128}
    config = ElectraConfig(**SIZES, **sizes, embedding_size=32, pad_token_id=1)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        ElectraModel(config).save_pretrained(folder)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def word_tokenizer(words: Iterable[str], length: int) -> dict[str, bytes]:
    """The files of a word-level tokenizer; the special tokens have the first ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    ids = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>"}
    config = {f"{name}_token": token for name, token in {**names, "unk": "<unk>"}.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def _write_sentence_transformers_files(folder: Path) -> None:
    names = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{name}"}
        for n, (path, name) in enumerate(names.items())
    ]
    _write_json(folder / "modules.json", modules)
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **modes})
    _write_json(folder / "2_Normalize" / "config.json", {})
    length = {"max_seq_length": 128, "do_lower_case": False}
    _write_json(folder / "sentence_bert_config.json", length)


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
def token_texts():
    """Forty texts of 3 to 20 tokens; no token is padding."""
    import numpy as np

    from bge_pruning.datasets.embedding_dataset import TokenizedTexts

    generator = np.random.default_rng(2)
    lengths = generator.integers(3, 21, 40)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return TokenizedTexts(generator.integers(4, 60, starts[-1]).astype(np.int32), starts, 0)


def write_parallel(folder: Path, **columns: str) -> str:
    """Write a file for each language, a line for each part between slashes; return their path."""
    for language, content in columns.items():
        lines = "".join(f"{text}\n" for text in content.split("/")).encode()
        (folder / f"news-{language.replace('_', '-')}.txt.gz").write_bytes(gzip.compress(lines))
    return str(folder / "news-{language}.txt.gz")


@pytest.fixture(scope="session")
def parallel_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of forty parallel lines in languages de, en and th; do not write there."""
    import numpy as np

    generator = np.random.default_rng(6)
    columns = {
        name: "/".join(" ".join(generator.choice(COLLECTION_WORDS, 5)) for _ in range(ROWS))
        for name in ("de", "en", "th")
    }
    return write_parallel(tmp_path_factory.mktemp("parallel"), **columns)
