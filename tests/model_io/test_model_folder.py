"""Every file and every key that other loaders read from a written folder.

Keys and layouts are those that transformers 5, sentence-transformers, FlagEmbedding,
text-embeddings-inference and vLLM ask for.
"""

import json
import pickletools
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bge_pruning.model_io.hub import no_loading_bars
from bge_pruning.model_io.model_folder import compute_hf_config, write_model_folder
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.model_io.projection import compute_modules, compute_selection
from tests.common.files import contents
from tests.common.trainings import read_json

ALWAYS = set(
    "config.json model.safetensors tokenizer.json tokenizer_config.json special_tokens_map.json "
    "modules.json 1_Pooling/config.json 2_Normalize/config.json sentence_bert_config.json "
    "config_sentence_transformers.json".split()
)
HEADS = {"colbert_linear.pt", "sparse_linear.pt"}
# text-embeddings-inference does not start without any of them.
REQUIRED_KEYS = set(
    "architectures hidden_act hidden_dropout_prob hidden_size initializer_range intermediate_size "
    "layer_norm_eps max_position_embeddings model_type num_attention_heads num_hidden_layers "
    "pad_token_id type_vocab_size vocab_size".split()
)


@pytest.fixture
def write(tmp_path, build_model, target_shape, tiny_hf_config, tokenizer_files):
    """A function that writes a small model, and returns the folder, the encoder and the heads."""

    def write(shape=target_shape, pooling="cls", config=None, tokenizer=None, length=78, **options):
        backbone, heads = build_model(shape, torch.float32, pooling)
        folder = tmp_path / "model"
        folder.mkdir()
        config = tiny_hf_config if config is None else config
        tokenizer = tokenizer_files if tokenizer is None else tokenizer
        write_model_folder(folder, backbone, heads, shape, config, tokenizer, length, **options)
        return folder, backbone, heads

    return write


@pytest.fixture
def folder(write) -> Path:
    return write()[0]


def test_the_sources_tokenizer_is_copied(write, tokenizer_files):
    source = {
        **tokenizer_files,
        "sentencepiece.bpe.model": bytes(range(256)),
        "special_tokens_map.json": b'{"pad_token": "<pad>", "name": "\xc3\xa9"}',
    }
    folder, _, _ = write(tokenizer=source)
    assert set(contents(folder)) == ALWAYS | HEADS | {"sentencepiece.bpe.model"}
    settings = json.loads(source.pop("tokenizer_config.json"))
    assert all((folder / name).read_bytes() == content for name, content in source.items())
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    assert read_json(folder / "tokenizer_config.json") == {**settings, **names}


def test_every_tool_cuts_at_the_same_length_and_none_pads(write, tokenizer_files):
    """Rust readers would cut at 5 here, transformers at 128, and neither at the model's 20."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    stored = Tokenizer.from_str(tokenizer_files["tokenizer.json"].decode())
    stored.enable_truncation(5)
    stored.enable_padding(pad_id=1, pad_token="<pad>", length=9)
    settings = {**json.loads(tokenizer_files["tokenizer_config.json"]), "max_length": 128}
    files = {
        "tokenizer.json": stored.to_str().encode(),
        "tokenizer_config.json": json.dumps({**settings, "model_max_length": 512}).encode(),
    }
    folder, _, _ = write(tokenizer=files, length=20)
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (written.truncation, written.padding) == (None, None)
    assert len(written.encode("plane").ids) == 3 and len(written.encode("plane " * 30).ids) == 32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(["plane " * 100, "plane"], truncation=True)
    assert [len(ids) for ids in found["input_ids"]] == [20, 3]
    assert set(tokenizer("plane", "plane")) == {"input_ids", "attention_mask"}


def test_special_tokens_are_taken_from_the_tokenizers_config(write, tokenizer_files):
    tokens = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "mask_token": {"content": "<mask>", "lstrip": True},
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
    }
    other = {"add_bos_token": True, "token": "x", "chat_token": None, "model_max_length": 78}
    config = json.dumps({**tokens, **other}).encode()
    folder, _, _ = write(tokenizer={**tokenizer_files, "tokenizer_config.json": config})
    assert read_json(folder / "special_tokens_map.json") == tokens
    shutil.rmtree(folder)
    folder, _, _ = write(tokenizer={"tokenizer.json": tokenizer_files["tokenizer.json"]})
    assert read_json(folder / "special_tokens_map.json") == {}


def test_files_that_a_server_reads_and_that_are_not_mixed_up(
    folder, tmp_path, build_model, target_shape, tiny_hf_config
):
    """A server may run as somebody else; the writer of safetensors makes files for their owner."""
    (tmp_path / "new").touch()
    written = {name: (folder / name).stat().st_mode for name in set(contents(folder))}
    assert written == dict.fromkeys(written, (tmp_path / "new").stat().st_mode)
    backbone, heads = build_model(target_shape, torch.float32)
    with pytest.raises(FileExistsError, match="model.safetensors"):
        write_model_folder(folder, backbone, heads, target_shape, tiny_hf_config, {}, 78)


def test_weights_have_the_names_of_hugging_face_and_heads_those_of_flag_embedding(
    write, target_shape, tiny_hf_config
):
    from transformers import XLMRobertaConfig, XLMRobertaModel

    folder, backbone, heads = write()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without which older transformers refuse it
    state = load_file(folder / "model.safetensors")
    config = XLMRobertaConfig(**compute_hf_config(tiny_hf_config, target_shape))
    expected = XLMRobertaModel(config).state_dict()
    assert {name: t.shape for name, t in state.items()} == {n: t.shape for n, t in expected.items()}
    assert all(torch.equal(state[name], t) for name, t in backbone.state_dict().items())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    sizes = {"colbert_linear": (32, 16), "sparse_linear": (1, 16)}
    for name, size in sizes.items():
        state = torch.load(folder / f"{name}.pt", weights_only=True)
        assert set(state) == {"weight", "bias"}
        assert state["weight"].shape == size and state["bias"].shape == size[:1]
        for key, tensor in getattr(heads, name).state_dict().items():
            assert torch.equal(state[key], tensor)


def test_heads_are_no_code(folder):
    """Loaders may unpickle them: only tensors are named."""
    for name in HEADS:
        with zipfile.ZipFile(folder / name) as archive:
            pickle = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            code = archive.read(pickle)
        named = {value for op, value, _ in pickletools.genops(code) if op.name == "GLOBAL"}
        assert named == {
            "collections OrderedDict",
            "torch FloatStorage",
            "torch._utils _rebuild_tensor_v2",
        }


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dim", [32, 0])
def test_nothing_is_written_that_does_not_exist(dim, sparse, pooler, write, target_shape):
    """A random head would be worse than none."""
    folder, _, _ = write(replace(target_shape, pooler=pooler, sparse_head=sparse, colbert_dim=dim))
    left = ({"colbert_linear.pt"} if dim else set()) | ({"sparse_linear.pt"} if sparse else set())
    assert set(contents(folder)) == ALWAYS | left
    names = load_file(folder / "model.safetensors").keys()
    assert any(name.startswith("pooler.") for name in names) == pooler


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_and_heads_have_the_precision_asked_for(dtype, write):
    from transformers import AutoConfig, AutoModel

    folder, backbone, heads = write(dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    config = read_json(folder / "config.json")
    assert config["dtype"] == config["torch_dtype"] == name
    state = load_file(folder / "model.safetensors")
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(state[key], tensor.to(dtype)), key
    for head in HEADS:
        module = getattr(heads, head.removesuffix(".pt"))
        state = torch.load(folder / head, weights_only=True)
        for key, tensor in module.state_dict().items():
            assert torch.equal(state[key], tensor.to(dtype)), key
            assert state[key].dtype == dtype
            size = state[key].untyped_storage().nbytes()
            assert size == dtype.itemsize * tensor.numel()
    base = load_base_model(str(folder))  # which is float32 whatever the folder is
    for ours, theirs in ((base.backbone, backbone), (base.heads, heads)):
        found = ours.state_dict()
        for name, tensor in theirs.state_dict().items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], tensor.to(dtype).float()), name
    assert AutoConfig.from_pretrained(folder).dtype == dtype
    with no_loading_bars():
        assert AutoModel.from_pretrained(folder).dtype == dtype


@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.bias", "sparse_linear.bias"])
def test_a_weight_beyond_the_precision_is_named(
    name, build_model, target_shape, tiny_hf_config, tokenizer_files, tmp_path
):
    backbone, heads = build_model(target_shape, torch.float32)
    part = backbone if name.startswith("encoder") else heads
    part.get_parameter(name).data[0] = -70_000.0
    arguments = (backbone, heads, target_shape, tiny_hf_config, tokenizer_files, 78)
    message = rf"^{name} holds 70000, and float16 ends at 65504\. To fix, write the model in bf16"
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=message):
        write_model_folder(tmp_path / "a", *arguments, dtype=torch.float16)
    (tmp_path / "b").mkdir()
    write_model_folder(tmp_path / "b", *arguments, dtype=torch.bfloat16)


def test_config_has_what_servers_require_and_drops_what_was_true_of_the_source(
    write, tiny_hf_config, target_shape
):
    """Also the keys that older vLLM requires, and those whose defaults the source relied on."""
    names = {"hidden_dropout_prob", "initializer_range", "attention_probs_dropout_prob"}
    names.add("position_embedding_type")
    source = {key: value for key, value in tiny_hf_config.items() if key not in names}
    folder, _, _ = write(config={**source, "task": "Ähnlichkeit 句子"})
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert "Ähnlichkeit 句子" in text and text.endswith("}\n")
    config = read_json(folder / "config.json")
    assert set(config) >= REQUIRED_KEYS
    assert config["position_embedding_type"] == "absolute"
    source = {
        **tiny_hf_config,
        "architectures": ["XLMRobertaForMaskedLM"],
        "torch_dtype": "float16",
        "dtype": "bfloat16",
        "head_dim": 16,
    }
    before = dict(source)
    config = compute_hf_config(source, replace(target_shape, vocab_size=50))
    assert config["vocab_size"] == 50
    assert config["architectures"] == ["XLMRobertaModel"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert not {"head_dim", "_name_or_path", "transformers_version"} & set(config)
    assert source == before


def test_config_has_the_cut_sizes_and_transformers_reads_them(folder, tiny_hf_config):
    config = read_json(folder / "config.json")
    new = {
        "architectures": ["XLMRobertaModel"],
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "position_embedding_type": "absolute",
        "dtype": "float32",
        "torch_dtype": "float32",
        "vocab_size": 99,
    }
    stale = {"_name_or_path", "transformers_version"}
    kept = {key: value for key, value in tiny_hf_config.items() if key not in stale}
    assert config == {**kept, **new}
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(folder).to_dict()
    assert read["model_type"] == "xlm-roberta"
    assert {key: read[key] for key in REQUIRED_KEYS} == {key: config[key] for key in REQUIRED_KEYS}


@pytest.mark.parametrize(("pooling", "cls", "mean"), [("cls", True, False), ("mean", False, True)])
def test_pooling_and_length_have_the_classic_keys(pooling, cls, mean, write):
    folder, _, _ = write(pooling=pooling, length=40)
    length = {"max_seq_length": 40, "do_lower_case": False}
    assert read_json(folder / "sentence_bert_config.json") == length
    assert read_json(folder / "1_Pooling" / "config.json") == {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": cls,
        "pooling_mode_mean_tokens": mean,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }


def test_a_projection_lies_before_normalisation(write):
    """text-embeddings-inference and vLLM read sizes, bias, activation and ``linear.weight``."""
    folder, _, _ = write(projection=torch.eye(32, 16))
    names = ("2_Dense/config.json", "2_Dense/model.safetensors", "3_Normalize/config.json")
    assert set(contents(folder)) == (ALWAYS | HEADS | set(names)) - {"2_Normalize/config.json"}
    assert read_json(folder / "modules.json") == compute_modules(projected=True)
    assert read_json(folder / "1_Pooling" / "config.json")["word_embedding_dimension"] == 16
    assert read_json(folder / "2_Dense" / "config.json") == {
        "in_features": 16,
        "out_features": 32,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        "linear.weight": (32, 16)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sentence_transformers_puts_kept_dimensions_in_their_places(dtype, write, tmp_path):
    """Whatever the precision of the weights: the plain vectors, and zeros elsewhere.

    Norms are added up in another order among zeros, so that the last bit may differ.
    """
    from sentence_transformers import SentenceTransformer

    kept = list(range(0, 32, 2))
    folder, _, _ = write(projection=compute_selection(kept, 32), dtype=dtype)
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "modules.json").write_text(json.dumps(compute_modules(projected=False)))
    (plain / "3_Normalize").rename(plain / "2_Normalize")
    found = []
    for name in (folder, plain):
        with no_loading_bars():
            model = SentenceTransformer(str(name), device="cpu", model_kwargs={"dtype": dtype})
        vectors = model.encode(["A plane is taking off.", "Yes."], convert_to_tensor=True)
        assert vectors.dtype == dtype and vectors.shape[1] == model.get_embedding_dimension()
        found.append(vectors)
    assert found[0].shape == (2, 32)
    torch.testing.assert_close(found[0][:, kept], found[1], atol=torch.finfo(dtype).eps, rtol=0)
    assert not found[0][:, 1::2].any()
