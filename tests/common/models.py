"""A tiny random XLM-R (L4 A4 H32 F64 V99, pad id 1) and its tokenizer."""

import gzip
import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bge_pruning.model_io.checkpoint import RunMetadata
from bge_pruning.model_io.example_models import (
    M3_SMALL,
    MINILM,
    ExampleModel,
    identify,
    is_complete,
    prepare,
)
from bge_pruning.model_io.pretrained import BaseModel, load_base_model
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.structural_pruning import AXES
from tests.common.data import word_tokenizer

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
SENTENCES = Path(__file__).parents[2] / "data" / "sentences"
LANGUAGES = ("ar", "de", "en", "fr", "hi", "ja", "sw", "zh")
SUBSETS = [subset for n in range(5) for subset in combinations(AXES, n)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``axes`` is every subset of the axes, ``gated_axes`` every one but the empty one."""
    own = str([mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")])
    for name, subsets in (("axes", SUBSETS), ("gated_axes", SUBSETS[1:])):
        if name in metafunc.fixturenames and not re.search(rf"\b{name}\b", own):
            metafunc.parametrize(name, subsets, ids=["-".join(s) or "none" for s in subsets])


def _build_model(
    shape: EncoderShape,
    dtype: torch.dtype = torch.float64,
    pooling: str = "cls",
    seed: int = 0,
    dropout: float = 0.0,
) -> tuple[XLMRobertaBackbone, EmbeddingHeads]:
    backbone = XLMRobertaBackbone(shape, dropout=dropout)
    heads = EmbeddingHeads(shape.hidden_size, pooling, shape.sparse_head, shape.colbert_dim)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Biases and LayerNorms too: at 0 and 1 they would hide errors.
        for module in (backbone, heads):
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.2 * noise + (1.0 if "LayerNorm.weight" in name else 0.0))
    return backbone.to(dtype).eval(), heads.to(dtype).eval()


@pytest.fixture(scope="session")
def tiny_shape() -> EncoderShape:
    sizes = {"vocab_size": 99, "head_dim": 8, "max_position_embeddings": 80, "colbert_dim": 32}
    return EncoderShape(32, 4, 4, 64, **sizes)


@pytest.fixture(scope="session")
def bge_m3_shape() -> EncoderShape:
    return EncoderShape(1024, 16, 24, 4096, 250002, head_dim=64, colbert_dim=1024)


@pytest.fixture(scope="session")
def target_shape(tiny_shape: EncoderShape) -> EncoderShape:
    """Exportable, and half of every axis."""
    return replace(
        tiny_shape, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32
    )


@pytest.fixture(scope="session")
def one_less_shape(tiny_shape: EncoderShape) -> EncoderShape:
    """One head, unit, dimension and layer less; not exportable."""
    return replace(
        tiny_shape, num_attention_heads=3, hidden_size=31, num_hidden_layers=3, intermediate_size=63
    )


@pytest.fixture(scope="session")
def build_model() -> Callable[..., tuple[XLMRobertaBackbone, EmbeddingHeads]]:
    return _build_model


@pytest.fixture(scope="session")
def tiny_hf_config(tiny_shape: EncoderShape) -> dict[str, Any]:
    """``config.json`` as BGE-M3's, tiny."""
    sizes = "hidden_size intermediate_size max_position_embeddings num_attention_heads "
    sizes += "num_hidden_layers vocab_size"
    dropouts = dict.fromkeys(["attention_probs_dropout_prob", "hidden_dropout_prob"], 0.1)
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    own = {"_name_or_path": "somewhere", "architectures": ["XLMRobertaModel"]}
    own |= {"model_type": "xlm-roberta", "torch_dtype": "float32", "transformers_version": "4.33.0"}
    rest = {"classifier_dropout": None, "hidden_act": "gelu", "initializer_range": 0.02}
    rest |= {"layer_norm_eps": 1e-05, "output_past": True, "type_vocab_size": 1, "use_cache": True}
    rest |= {"position_embedding_type": "absolute"}
    return own | {n: getattr(tiny_shape, n) for n in sizes.split()} | dropouts | tokens | rest


@pytest.fixture(scope="session")
def batch() -> dict[str, torch.Tensor]:
    """Four texts with repeated tokens; three are padded."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 99, (4, 9), generator=generator)
    ids[:, 0] = 0
    ids[1, 3] = ids[1, 5]
    for row, length in enumerate((9, 7, 4, 2)):
        ids[row, length - 1] = 2
        ids[row, length:] = 1
    return {"input_ids": ids, "attention_mask": ids.ne(1).long()}


@pytest.fixture(scope="session")
def tokenizer_files() -> dict[str, bytes]:
    """A word-level tokenizer for the words and marks of extraction's sentences, 99 tokens."""
    from tokenizers.pre_tokenizers import Whitespace

    from bge_pruning.export.validation import VALIDATION_SENTENCES

    whitespace = Whitespace()
    words = [w for s in VALIDATION_SENTENCES for w, _ in whitespace.pre_tokenize_str(s)]
    return word_tokenizer([w for w in dict.fromkeys(words) if w not in SPECIAL][:95], 78)


@pytest.fixture(scope="session")
def run_metadata(
    tiny_shape: EncoderShape,
    target_shape: EncoderShape,
    tiny_hf_config: dict[str, Any],
    tokenizer_files: dict[str, bytes],
) -> RunMetadata:
    """Of a run that halves every axis; not to be changed."""
    gates = {"axes": list(AXES), "target": asdict(target_shape), "target_parameters": None}
    gates |= {"start_sparsity": 0.0, "init_mean": 3.0, "init_std": 0.25, "seed": 5}
    return RunMetadata(
        base_model="someone/tiny",
        shape=asdict(tiny_shape),
        hf_config=tiny_hf_config,
        pooling="cls",
        max_seq_length=78,
        seed=5,
        l0_module=gates,
        source_pruning=None,
        versions={"torch": "2.7.0"},
        tokenizer_files=tokenizer_files,
    )


@pytest.fixture
def metadata(run_metadata: RunMetadata) -> RunMetadata:
    """A copy that a test may change."""
    return deepcopy(run_metadata)


@pytest.fixture(scope="session")
def build_checkpoint() -> Callable[[RunMetadata], dict[str, Any]]:
    """What Composer writes for a run with this metadata, as far as this project reads it."""

    def build(metadata: RunMetadata) -> dict[str, Any]:
        shape = EncoderShape(**metadata.shape)
        backbone, heads = _build_model(shape, torch.float32, metadata.pooling)
        modules = {"backbone": backbone, "heads": heads}
        if metadata.l0_module is not None:
            target = metadata.l0_module["target"]
            arguments = {**metadata.l0_module, "target": target and EncoderShape(**target)}
            modules["l0_module"] = L0Module(shape, **arguments)
        state = {
            f"{prefix}.{name}": tensor
            for prefix, module in modules.items()
            for name, tensor in module.state_dict().items()
        }
        callbacks = [("RunMetadataCallback", metadata.state_dict())]
        timestamp = {"Timestamp": {"epoch": 0, "batch": 12}}
        return {"state": {"model": state, "callbacks": callbacks, "timestamp": timestamp}}

    return build


def _news() -> list[str]:
    """The first 400 sentences of each of eight languages."""
    paths = [SENTENCES / f"newstest2019-{name}.txt.gz" for name in LANGUAGES]
    texts = [gzip.decompress(path.read_bytes()).decode().splitlines() for path in paths]
    return [text for part in texts for text in part[:400]]


@pytest.fixture(scope="session")
def unigram_files() -> dict[str, bytes]:
    """A Unigram tokenizer of 6,001 pieces in XLM-R's layout, trained on eight languages."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import Unigram
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import UnigramTrainer

    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = UnigramTrainer(
        vocab_size=6000, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_news(), trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"].append(["<mask>", 0.0])
    mask = {**content["added_tokens"][0], "id": 6000, "content": "<mask>", "lstrip": True}
    content["added_tokens"].append(mask)
    names = {"bos": 0, "cls": 0, "eos": 2, "sep": 2, "pad": 1, "unk": 3}
    special = {f"{name}_token": SPECIAL[index] for name, index in names.items()}
    special["mask_token"] = {key: value for key, value in mask.items() if key != "id"}
    decoder = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in content["added_tokens"]
    }
    config = {**special, "mask_token": "<mask>", "added_tokens_decoder": decoder}
    config |= {"model_max_length": 512, "tokenizer_class": "XLMRobertaTokenizer"}
    files = {"tokenizer": content, "tokenizer_config": config, "special_tokens_map": special}
    encoded = {f"{name}.json": json.dumps(content).encode() for name, content in files.items()}
    return {**encoded, "sentencepiece.bpe.model": b"the old pieces"}


@pytest.fixture(scope="session")
def unigram_folder(
    tmp_path_factory: pytest.TempPathFactory,
    unigram_files: dict[str, bytes],
    tiny_shape: EncoderShape,
    tiny_hf_config: dict[str, Any],
) -> Path:
    """A tiny random XLM-R with that tokenizer; do not write into it."""
    from bge_pruning.model_io.model_folder import write_model_folder

    folder = tmp_path_factory.mktemp("unigram") / "xlmr"
    folder.mkdir()
    shape = replace(tiny_shape, vocab_size=6001, max_position_embeddings=514)
    config = {**tiny_hf_config, "max_position_embeddings": 514}
    backbone, heads = _build_model(shape, torch.float32)
    heads.sparse_linear.bias.data = torch.tensor([1.5])  # lifts most tokens above 0
    write_model_folder(folder, backbone, heads, shape, config, unigram_files, 512)
    return folder


def write_again(source: Path, folder: Path) -> Path:
    """The folder that extraction would write if nothing was cut."""
    from bge_pruning.model_io.model_folder import write_model_folder

    base = load_base_model(str(source), init_missing_heads=True)
    folder.mkdir()
    parts = (base.backbone, base.heads, base.shape, base.hf_config, base.tokenizer_files)
    write_model_folder(folder, *parts, base.max_seq_length, base.prompts)
    return folder


@pytest.fixture(scope="session")
def unigram(unigram_folder: Path) -> BaseModel:
    """That model; not to be changed."""
    return load_base_model(str(unigram_folder))


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The small real model, converted if the checkout does not hold it; not to be changed."""
    csv = tmp_path_factory.mktemp("minilm") / "few.csv"
    csv.write_text("A plane is taking off.,A man is playing a flute.,1.0\n")
    return load_base_model(str(_prepared(MINILM, csv.with_name("xlmr"), csv)))


def _prepared(model: ExampleModel, output: Path, sentences: Path) -> Path:
    """The one of the checkout, or else a new one."""
    folder = SENTENCES.parents[1] / model.output
    if is_complete(folder, identify(model)):
        return folder
    return prepare(model, output, sentences)


@pytest.fixture(scope="session")
def m3_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the small real BGE-M3, made if the checkout does not hold it; not to be changed."""
    return _prepared(M3_SMALL, tmp_path_factory.mktemp("m3") / "m3-small", Path("not needed"))


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[dict[str, Any]], bytes]:
    """A function that makes a ``tokenizer.json`` around the model section."""

    def make(model: dict[str, Any]) -> bytes:
        keys = ("truncation", "padding", "normalizer", "post_processor", "decoder")
        rest = {"pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": [], "model": model}
        return json.dumps({"version": "1.0", **dict.fromkeys(keys), **rest}).encode()

    return make


@pytest.fixture(scope="session")
def make_unigram(make_tokenizer: Callable[[dict[str, Any]], bytes]) -> Callable[..., bytes]:
    """A function that makes a Unigram ``tokenizer.json``: ``<unk>`` is 0, then come the pieces."""

    def make(pieces: dict[str, float]) -> bytes:
        vocabulary = [["<unk>", 0.0], *map(list, pieces.items())]
        return make_tokenizer({"type": "Unigram", "unk_id": 0, "vocab": vocabulary})

    return make


@pytest.fixture(scope="session")
def write_run(build_checkpoint: Callable[[RunMetadata], dict[str, Any]]) -> Callable[..., Path]:
    """A function that writes the checkpoint of a run into a folder, which it returns."""

    def write(
        folder: Path, metadata: RunMetadata, tensors: dict[str, Tensor] | None = None
    ) -> Path:
        folder.mkdir(exist_ok=True)
        content = build_checkpoint(metadata)
        content["state"]["model"].update(tensors or {})
        torch.save(content, folder / "latest-rank0.pt")
        return folder

    return write


@pytest.fixture
def save_run(tmp_path: Path, write_run: Callable[..., Path]) -> Callable[..., Path]:
    """A function that writes the checkpoint of a run, and returns the run folder."""
    return partial(write_run, tmp_path / "run")


@pytest.fixture
def run(save_run, metadata) -> Path:
    return save_run(metadata)


def _attend_within_texts(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """What torch's kernel for any lengths computes, by a mask over all pairs of tokens."""
    assert cu_q.dtype == torch.int32 and cu_q is cu_k and max_q == max_k
    text = torch.bucketize(torch.arange(len(query)), cu_q[1:], right=True)
    parts = [x.transpose(0, 1)[None] for x in (query, key, value)]
    mask = text[:, None] == text[None]
    return F.scaled_dot_product_attention(*parts, attn_mask=mask)[0].transpose(0, 1)


@pytest.fixture(scope="session")
def attend_within_texts() -> Callable[..., Tensor]:
    """Stands for the kernel that only a GPU has."""
    return _attend_within_texts
