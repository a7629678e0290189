"""A small collection for evaluation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

WORDS = "the man woman dog cat child park plays reads eats rides guitar red book horse fast".split()


@pytest.fixture(scope="session")
def write_collection() -> Callable[..., Path]:
    """A function that writes a collection of ``count`` passages, a query for every second one."""

    def write(folder: Path, count: int = 30, seed: int = 1) -> Path:
        generator = np.random.default_rng(seed)
        (folder / "qrels").mkdir(parents=True)

        def sentence() -> str:
            return " ".join(generator.choice(WORDS, generator.integers(3, 9)))

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
def collection(tmp_path_factory, write_collection) -> Path:
    return write_collection(tmp_path_factory.mktemp("retrieval") / "tiny")


@pytest.fixture(scope="session")
def small_folder(model_folder, tmp_path_factory) -> Path:
    """The first half of the layers of the model: what pruning could have left."""
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
def bert_folder(model_folder, tmp_path_factory) -> Path:
    """A BERT model in the sentence-transformers layout, with mean pooling and the same words."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert") / "tiny-bert"
    shutil.copytree(model_folder, folder)
    for name in ("colbert_linear.pt", "sparse_linear.pt", "model.safetensors", "config.json"):
        (folder / name).unlink()
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        pad_token_id=1,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        BertModel(config).save_pretrained(folder)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder
