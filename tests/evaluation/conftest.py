"""Models to evaluate, and several ranks in one process."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from safetensors.torch import load_file, save_file

from bge_pruning.evaluation.text_encoder import Ranks, TextEncoder
from bge_pruning.model_io.pretrained import load_base_model


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """An evaluation collects garbage: among its own objects, not those of imported libraries."""
    import mteb  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def encoder(model_folder) -> TextEncoder:
    """Do not change it."""
    return TextEncoder(load_base_model(str(model_folder)), batch_size=2)


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
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 1}
    config = BertConfig(**sizes, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        BertModel(config).save_pretrained(folder)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list]:
    """A function that does some work as several ranks, each a thread, and returns what each got."""

    def run(count: int, work: Callable[[Ranks], object]) -> list:
        barrier, slots = Barrier(count, timeout=60), [None] * count

        def of_rank(rank: int) -> object:
            def gather(part: object) -> list:
                slots[rank] = part
                barrier.wait()
                parts = list(slots)
                barrier.wait()
                return parts

            return work(Ranks(rank, count, gather))

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(of_rank, range(count)))

    return run
