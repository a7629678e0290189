"""A tiny random model in the folder layout of an extracted one."""

import json
from pathlib import Path

import pytest

WORDS = "a the man woman dog cat plays eats runs guitar apple fast slowly in park house".split()
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_tiny_model(folder: Path, *, layers: int = 2, seed: int = 7, heads: bool = True) -> Path:
    """Writes a model of L layers, A=2, H=16, F=32 in the classic sentence-transformers layout."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    vocabulary = {token: index for index, token in enumerate([*SPECIAL.values(), "<mask>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=32,
        **SPECIAL,
    ).save_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
        type_vocab_size=1,
        initializer_range=0.5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        XLMRobertaModel(config).save_pretrained(folder)
        if heads:
            torch.save(torch.nn.Linear(16, 16).state_dict(), folder / "colbert_linear.pt")
            torch.save(torch.nn.Linear(16, 1).state_dict(), folder / "sparse_linear.pt")
    _write_modules(folder)
    return folder


def _write_modules(folder: Path) -> None:
    names = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{name}"}
        for n, (path, name) in enumerate(names.items())
    ]
    pooling = {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    }
    for path in ("1_Pooling", "2_Normalize"):
        (folder / path).mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 32, "do_lower_case": False})
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one layer: what pruning could have left."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "small", layers=1)


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def pairs() -> tuple[list[str], list[str], list[float]]:
    """Six pairs; one sentence occurs three times."""
    first = ["a man plays guitar", "the dog runs fast", "a cat eats", "a man plays guitar"]
    second = ["the man plays a guitar", "a dog runs", "the woman runs in the park", "a cat eats"]
    first += ["the house", "a woman eats an apple slowly"]
    second += ["the dog runs in the house", "the man eats apple"]
    return first, second, [4.8, 4.0, 0.5, 0.0, 1.5, 3.0]
