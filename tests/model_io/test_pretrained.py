"""Base models in the layouts that the hub holds, damaged ones, and the hub itself, offline."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from bge_pruning.datasets.embedding_dataset import build_tokenizer
from bge_pruning.evaluation.encoders import SentenceTransformerEncoder, load_encoder
from bge_pruning.export.folder_check import check_folder
from bge_pruning.model_io import hub as hub_module
from bge_pruning.model_io.hub import fetch_model_folder, no_loading_bars
from bge_pruning.model_io.model_files import (
    ForeignModelError,
    read_hf_config,
    read_pooling,
    read_special_ids,
)
from bge_pruning.model_io.pretrained import (
    describe_load_error,
    load_base_model,
    load_strict,
    read_shape,
    without_weights,
)
from bge_pruning.model_io.projection import read_projection
from bge_pruning.model_io.tokenizer_files import DIFFICULT
from tests.common.code import Code
from tests.common.files import FOREIGN, edit_json
from tests.common.models import write_again

CODE_FILES = ("pytorch_model.bin", "colbert_linear.pt", "sparse_linear.pt")
LAYOUTS = ("bge_m3", "language_model", "e5")


def randomised(model: nn.Module) -> nn.Module:
    """All parameters random: biases at 0 and LayerNorms at 1 would hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_sentence_transformers(folder: Path, pooling: str, length: int) -> None:
    modes = {f"pooling_mode_{mode}_token": False for mode in ("max", "mean_sqrt_len")}
    modes |= {"pooling_mode_cls_token": pooling == "cls"}
    modes |= {"pooling_mode_mean_tokens": pooling == "mean"}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **modes})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": length})


def write_common(folder: Path, config: dict, tokenizer_files: dict[str, bytes]) -> None:
    write_json(folder / "config.json", config)
    for name, content in tokenizer_files.items():
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def encoder(tiny_hf_config) -> nn.Module:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    return randomised(XLMRobertaModel(XLMRobertaConfig(**tiny_hf_config)))


@pytest.fixture(scope="module")
def bge_m3_heads() -> dict[str, dict[str, Tensor]]:
    """In half precision, which must not matter."""
    heads = {"colbert_linear": nn.Linear(32, 32), "sparse_linear": nn.Linear(32, 1)}
    return {name: randomised(head).half().state_dict() for name, head in heads.items()}


@pytest.fixture
def bge_m3(tmp_path, encoder, bge_m3_heads, tiny_hf_config, tokenizer_files) -> Path:
    """The files of BAAI/bge-m3: an old ``pytorch_model.bin``, heads, sentencepiece."""
    folder = tmp_path / "bge-m3"
    write_common(folder, tiny_hf_config, tokenizer_files)
    buffers = {"embeddings.position_ids": torch.arange(80)[None]}
    torch.save({**encoder.state_dict(), **buffers}, folder / "pytorch_model.bin")
    for name, head in bge_m3_heads.items():
        torch.save(head, folder / f"{name}.pt")
    (folder / "sentencepiece.bpe.model").write_bytes(bytes(range(256)))
    write_json(folder / "special_tokens_map.json", {"pad_token": "<pad>"})
    write_sentence_transformers(folder, "cls", 64)
    write_json(folder / "modules.json", [])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# BGE-M3")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx_data").write_bytes(b"large")
    return folder


@pytest.fixture
def language_model(tmp_path, tiny_hf_config, tokenizer_files) -> Path:
    """A masked language model as FacebookAI/xlm-roberta-base: prefix, output layer, no pooler."""
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    folder = tmp_path / "xlm-roberta-base"
    config = {**tiny_hf_config, "architectures": ["XLMRobertaForMaskedLM"]}
    write_common(folder, config, tokenizer_files)
    state = randomised(XLMRobertaForMaskedLM(XLMRobertaConfig(**config))).state_dict()
    assert {"roberta.embeddings.LayerNorm.bias", "lm_head.dense.weight"} <= set(state)
    assert not any("pooler" in name for name in state)
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def layout(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def e5(tmp_path, encoder, tiny_hf_config, tokenizer_files) -> Path:
    """As intfloat/multilingual-e5-base: safetensors, mean pooling, no heads."""
    folder = tmp_path / "e5"
    write_common(folder, tiny_hf_config, tokenizer_files)
    state = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_sentence_transformers(folder, "mean", 48)
    return folder


def assert_equals_hugging_face(folder: Path, batch: dict[str, Tensor]) -> None:
    from transformers import AutoModel

    with no_loading_bars():
        theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).double().eval()
    ours = load_base_model(str(folder)).backbone.double().eval()
    with torch.no_grad():
        mine, expected = ours(**batch), theirs(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(mine[real], expected[real], atol=1e-10, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
def test_a_layout_is_read_as_hugging_face_reads_it(layout, batch):
    assert_equals_hugging_face(layout, batch)
    assert read_shape(layout) == load_base_model(str(layout)).shape
    before = torch.get_rng_state()
    base = load_base_model(str(layout), dropout=0.25)
    assert torch.equal(torch.get_rng_state(), before)
    assert {m.p for m in base.backbone.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert {layer.attention.self.dropout_p for layer in base.backbone.encoder.layer} == {0.25}
    base = load_base_model(str(layout), init_missing_heads=True)
    for module in (base.backbone, base.heads):
        for tensor in (*module.parameters(), *module.buffers()):
            assert tensor.device.type == "cpu" and tensor.is_contiguous()
            assert tensor.dtype == torch.float32
    frozen = {name for name, p in base.backbone.named_parameters() if not p.requires_grad}
    assert frozen <= {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize("prefix", ["", "roberta.", "xlm_roberta.", "model."])
def test_prefixes(prefix, e5, encoder):
    state = {prefix + name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    save_file({**state, "lm_head.bias": torch.ones(99)}, e5 / "model.safetensors")
    torch.save({"embeddings.LayerNorm.bias": torch.ones(32)}, e5 / "pytorch_model.bin")  # not read
    assert read_shape(e5) == load_base_model(str(e5)).shape
    loaded = load_base_model(str(e5)).backbone.state_dict()
    assert loaded.keys() == encoder.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["layer_norm_eps", "pad_token_id"])
def test_half_precision_and_keys_that_config_leaves_out(key, dtype, e5, batch):
    """They mean what they mean to transformers, also of a small scale, where an epsilon counts."""
    path = e5 / "model.safetensors"
    state = {n: (t * 0.01 if "embeddings.w" in n else t) for n, t in load_file(path).items()}
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    save_file(state, path, metadata={"format": "pt"})
    assert {p.dtype for p in load_base_model(str(e5)).backbone.parameters()} == {torch.float32}
    config = json.loads((e5 / "config.json").read_text())
    del config[key]
    write_json(e5 / "config.json", config)
    assert_equals_hugging_face(e5, batch)


def test_bge_m3_has_its_heads_and_no_text_is_longer_than_its_positions(
    bge_m3, bge_m3_heads, tiny_shape, tiny_hf_config, messages, language_model
):
    base = load_base_model(str(bge_m3))
    for name, head in bge_m3_heads.items():
        for key, tensor in getattr(base.heads, name).state_dict().items():
            assert torch.equal(tensor, head[key].float())
    assert base.shape == tiny_shape
    assert base.hf_config == tiny_hf_config
    assert base.name == str(bge_m3)
    assert base.heads.pooling == "cls"
    assert base.max_seq_length == 64
    assert base.pruning is None
    assert (base.license, base.origin) == ("mit", None)
    names = "tokenizer.json tokenizer_config.json special_tokens_map.json sentencepiece.bpe.model"
    assert set(base.tokenizer_files) == set(names.split())
    assert all(file == (bge_m3 / n).read_bytes() for n, file in base.tokenizer_files.items())
    assert not messages.records
    # 80 positions; the first text position is pad_token_id + 1.
    assert load_base_model(str(language_model)).max_seq_length == 78
    for length in (100_000, 79):
        write_json(bge_m3 / "sentence_bert_config.json", {"max_seq_length": length})
        assert load_base_model(str(bge_m3)).max_seq_length == 78


def test_missing_heads_are_named_or_made_anew(e5, bge_m3, batch, messages, bge_m3_heads):
    base = load_base_model(str(e5))
    hidden = base.backbone(**batch)
    assert set(base.heads.outputs(hidden, batch["attention_mask"])) == {"dense_vecs"}
    assert not base.shape.sparse_head and base.shape.colbert_dim == 0
    assert (
        f"{e5} has no sparse_linear.pt and no colbert_linear.pt: only the remaining outputs exist "
        "(model.init_missing_heads=true makes new heads)" in messages.text
    )
    (bge_m3 / "sparse_linear.pt").unlink()
    base = load_base_model(str(bge_m3))
    assert base.heads.sparse_linear is None and base.shape.colbert_dim == 32
    assert "has no sparse_linear.pt: only the remaining outputs" in messages.text
    first = load_base_model(str(e5), init_missing_heads=True)
    assert torch.equal(first.heads.colbert_linear.weight, torch.eye(32))
    assert not first.heads.colbert_linear.bias.any()
    weights = first.heads.token_weights(hidden, batch["attention_mask"])
    assert torch.equal(weights, 0.3 * batch["attention_mask"])  # all tokens alike
    one, other = (
        load_base_model(str(e5), init_missing_heads=True, colbert_dim=8).heads.colbert_linear
        for _ in range(2)
    )
    assert one.weight.shape == (8, 32) and torch.equal(one.weight, other.weight)
    assert first.shape.sparse_head and first.shape.colbert_dim == 32
    for name in ("sparse_linear", "colbert_linear"):
        assert f"{name}: not in the base model, initialised (it needs training)" in messages.text
    heads = load_base_model(str(bge_m3), init_missing_heads=True).heads
    old = bge_m3_heads["colbert_linear"]["weight"].float()
    assert torch.equal(heads.colbert_linear.weight, old) and heads.sparse_linear is not None
    assert read_shape(e5, 32) == load_base_model(str(e5), init_missing_heads=True).shape
    assert read_shape(bge_m3, 16).colbert_dim == 32  # its own head stays


def test_the_pruning_record_of_an_extracted_model(e5):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}
    counts = {"encoder": 2, "total": 3}
    record = {
        "source": {"base_model": "a"},
        "source_shape": sizes,
        "shape": sizes,
        "parameters": {"source": counts, "extracted": counts},
        "kept": {"hidden": [0, 2]},
        "constraint": {},
    }
    write_json(e5 / "pruning.json", record)
    assert load_base_model(str(e5)).pruning.as_dict() == record
    write_json(e5 / "pruning.json", {**record, "kept": {"hidden": "all"}})
    with pytest.raises(
        ValueError, match=r"pruning.json: kept.hidden is \"all\", expected a list.*To"
    ):
        load_base_model(str(e5))


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        (None, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "cls"}, "cls"),
        ({"embedding_dimension": 32, "pooling_mode": "mean"}, "mean"),
    ],
    ids=["none", "classic cls", "classic mean", "new cls", "new mean"],
)
def test_pooling_is_read(config, pooling, e5):
    shutil.rmtree(e5 / "1_Pooling")
    if config is not None:
        write_json(e5 / "1_Pooling" / "config.json", config)
    assert read_pooling(e5) == pooling
    assert load_base_model(str(e5)).heads.pooling == pooling
    assert load_base_model(str(e5), pooling="cls").heads.pooling == "cls"


def test_another_pooling_is_not_taken_for_cls_or_mean(e5):
    with pytest.raises(ValueError, match=r"pooling 'max' is not one of .* To fix, set model\.pool"):
        load_base_model(str(e5), pooling="max")
    for config in (
        {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode_mean_sqrt_len_tokens": True},
        {"pooling_mode": "lasttoken"},
    ):
        write_json(e5 / "1_Pooling" / "config.json", config)
        with pytest.raises(ValueError, match=r"1_Pooling.*pooling.*To fix"):
            load_base_model(str(e5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 5}, r"only in model: encoder\.layer\.4\..* and 12 more"),
        ({"num_hidden_layers": 3}, r"only in checkpoint: encoder\.layer\.3\..* and 12 more"),
        ({"hidden_size": 16}, r"LayerNorm\.weight is \(32,\) in the checkpoint, \(16,\) in the"),
        ({"intermediate_size": 48}, r"\(64, 32\) in the checkpoint, \(48, 32\) in the model"),
        ({"vocab_size": 120}, r"word_embeddings\.weight is \(99, 32\) in the checkpoint, \(120, "),
        ({"max_position_embeddings": 514}, r"position_embeddings\.weight is \(80, 32\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_and_weights_disagree(change, message, e5):
    edit_json(e5 / "config.json", **change)
    expected = r"checkpoint and model disagree: .*To fix, use the weights and the config"
    with pytest.raises(ValueError, match=re.escape(str(e5)) + ": " + expected) as caught:
        load_base_model(str(e5))
    assert re.search(message, str(caught.value))


def test_every_difference_is_in_one_message():
    state = {"weight": torch.ones(3, 2), "extra": torch.ones(1)}
    message = (
        r"^here: checkpoint and model disagree: only in model: bias; only in checkpoint: extra; "
        r"shapes: weight is \(3, 2\) in the checkpoint, \(2, 2\) in the model\. To fix"
    )
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=message):
        load_strict(layer, state, "here")
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_module_takes_tensors_over_in_its_own_precision(dtype):
    with without_weights():
        layer = nn.Linear(2, 3)
        layer.bias.requires_grad_(False)
    state = {"weight": torch.rand(2, 3).t().to(dtype), "bias": torch.rand(3).to(dtype)}
    load_strict(layer, state, "here")
    for name, parameter in layer.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.is_leaf
        assert parameter.dtype == torch.float32 and parameter.is_contiguous()
        assert torch.equal(parameter, state[name].float())
    assert [p.requires_grad for p in layer.parameters()] == [True, False]
    shared = layer.bias.data_ptr() == state["bias"].data_ptr()
    assert shared == (dtype == torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
def test_training_a_model_leaves_its_files_alone(layout, batch):
    before = {path: path.read_bytes() for path in layout.iterdir() if path.is_file()}
    base = load_base_model(str(layout), init_missing_heads=True)
    modules = nn.ModuleList([base.backbone, base.heads])
    weights = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e3)
    old = [p.detach().clone() for p in weights]
    outputs = base.heads.outputs(base.backbone(**batch), batch["attention_mask"])
    sum(output.sum() for output in outputs.values()).backward()
    optimizer.step()
    assert sum(not torch.equal(p, o) for p, o in zip(weights, old, strict=True)) > len(old) // 2
    for parameter in modules.parameters():
        parameter.data.zero_()
    assert {path: path.read_bytes() for path in before} == before


def test_a_model_does_not_change_when_its_files_are_written_anew(bge_m3, bge_m3_heads, batch):
    for name, head in bge_m3_heads.items():  # in a precision that needs no copy
        torch.save({key: value.float() for key, value in head.items()}, bge_m3 / f"{name}.pt")
    base = load_base_model(str(bge_m3))
    expected = base.heads.outputs(base.backbone(**batch), batch["attention_mask"])
    for name in ("sparse_linear.pt", "colbert_linear.pt"):
        (bge_m3 / name).write_bytes(bytes((bge_m3 / name).stat().st_size))
    weights = bge_m3 / "pytorch_model.bin"
    (bge_m3 / "new.bin").write_bytes(bytes(weights.stat().st_size))
    (bge_m3 / "new.bin").replace(weights)
    found = base.heads.outputs(base.backbone(**batch), batch["attention_mask"])
    assert all(torch.equal(found[name], output) for name, output in expected.items())


@pytest.mark.parametrize("name", CODE_FILES)
@pytest.mark.parametrize(
    "state",
    [
        {"weight": torch.ones(32, 16), "bias": torch.ones(32)},
        {"weight": torch.ones(32)},
        {"weight": torch.tensor(1.0), "bias": torch.ones(1)},
        {"linear.weight": torch.ones(32, 32)},
        {},
        {1: torch.ones(2)},
        torch.ones(32, 32),
        [1, 2],
    ],
    ids=["size", "no bias", "scalar", "names", "empty", "numbers", "tensor", "list"],
)
def test_tensors_of_another_layout(name, state, bge_m3):
    torch.save(state, bge_m3 / name)
    with pytest.raises(ValueError, match=r"bge-m3.*(disagree|not only tensors).* To fix"):
        load_base_model(str(bge_m3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mpnet"}, r"model_type is 'mpnet', expected 'xlm-roberta'\. To fix, ch"),
        ({"model_type": None}, r"model_type is None, expected 'xlm-roberta'\. To fix, choose"),
        ({"hidden_act": "relu"}, r"hidden_act is 'relu', expected 'gelu'\. To fix, choose"),
        (
            {"position_embedding_type": "relative_key"},
            r"position_embedding_type is 'relative_key', expected 'absolute'\. To fix",
        ),
        ({"num_attention_heads": 5}, r"(num_attention_heads|disagree).*To fix"),
        ({"num_attention_heads": 0}, r"num_attention_heads.* 0.*To fix"),
        ({"hidden_size": "32"}, r'hidden_size is "32", expected a number of 1.*To fix'),
        ({"num_hidden_layers": -1}, r"(num_hidden_layers|disagree).*To fix"),
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers is 1000000000000, .* 1,000\. To fix"),
        ({"vocab_size": 10**30}, r"vocab_size is a huge number, .* at most 10,000,000\. To fix"),
        ({"pad_token_id": "1"}, r'pad_token_id is "1", expected an id up to 78\. To fix'),
        ({"pad_token_id": 10**6}, r"pad_token_id is 1000000, expected an id up to 78"),
        ({"type_vocab_size": None}, r"type_vocab_size is null, expected a number from 1 to 1000"),
        ({"layer_norm_eps": [1]}, r"layer_norm_eps is a list, expected a number from 0 to 1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(config, message, e5):
    edit_json(e5 / "config.json", **config)
    with pytest.raises(ValueError, match=r"(config\.json|e5): .*" + message):
        load_base_model(str(e5))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sentence_bert", {"max_seq_length": [1]}, "max_seq_length is a list, expected"),
        ("sentence_bert", {"max_seq_length": "9"}, 'max_seq_length is "9", expected a w'),
        ("tokenizer", {"cls_token": [1]}, "cls_token is a list, expected a text"),
        ("tokenizer", {"pad_token": {"x": 1}}, "pad_token is an object, expected a text"),
        ("sentence_transformers", {"prompts": ["query: "]}, "prompts.* is .*, expected"),
        ("sentence_transformers", {"prompts": {"query": 5}}, "prompts.* is .*, expected"),
        ("sentence_transformers", {"prompts": {"query": None}}, "prompts.* is .*, expected"),
    ],
)
def test_settings_of_another_kind(name, content, message, bge_m3):
    file = f"config_{name}.json" if name == "sentence_transformers" else f"{name}_config.json"
    write_json(bge_m3 / file, content)
    with pytest.raises(ValueError, match=rf"{file}: {message}.* To fix, copy it again"):
        load_base_model(str(bge_m3))


def test_a_prompt_that_sentence_transformers_would_treat_otherwise(bge_m3):
    """It does not load a default that is not there, and may leave prompts out of the mean."""
    prompts = bge_m3 / "config_sentence_transformers.json"
    write_json(prompts, {"default_prompt_name": "query"})
    message = r'default_prompt_name is "query", which is none of prompts \(empty\).* To fix, add'
    with pytest.raises(ValueError, match=message):
        load_base_model(str(bge_m3))
    write_json(prompts, {"prompts": {"query": "q: "}, "default_prompt_name": "query"})
    assert load_base_model(str(bge_m3)).prompts["default_prompt_name"] == "query"
    (bge_m3 / "1_Pooling").mkdir(exist_ok=True)
    write_json(bge_m3 / "1_Pooling" / "config.json", {"include_prompt": False})
    write_json(bge_m3 / "modules.json", [])
    for load in (load_base_model, load_encoder):
        with pytest.raises(ValueError, match=r"include_prompt is false: .* To fix, set it to true"):
            load(str(bge_m3))


def test_missing_files_and_sizes_are_named(e5, tmp_path):
    def refused(message: str, read=lambda folder: load_base_model(str(folder)), folder=e5):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            read(folder)

    refused(r"config\.json: no such file\. To fix, choose a model folder", folder=tmp_path)
    (e5 / "tokenizer.json").unlink()
    message = r"e5: has no tokenizer\.json, which every server needs\. To fix, save the model's"
    refused(message)
    (e5 / "model.safetensors").rename(e5 / "model-00001-of-00002.safetensors")
    message = (
        r"e5: has neither model\.safetensors nor pytorch_model\.bin, nor the index of their sh"
    )
    refused(message, read_shape)
    refused(message)
    write_json(e5 / "config.json", {"model_type": "xlm-roberta", "hidden_act": "gelu"})
    names = "hidden_size, num_attention_heads, num_hidden_layers, intermediate_size, vocab_size"
    refused(rf"config\.json: lacks {names}, max_position_embeddings\. To fix", read_hf_config)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"], ids=repr)
@pytest.mark.parametrize(
    "name",
    "config.json sentence_bert_config.json tokenizer_config.json 1_Pooling/config.json "
    "pruning.json".split(),
)
def test_damaged_json(name, content, e5):
    (e5 / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name) + r": (is not|it is a list).*To fix"):
        load_base_model(str(e5))


@pytest.mark.parametrize("content", [0.0, 0.001, 0.5, 0.999, *FOREIGN.values()], ids=str)
@pytest.mark.parametrize(
    ("layout", "name"),
    [("e5", "model.safetensors"), *(("bge_m3", name) for name in CODE_FILES)],
    indirect=["layout"],
)
def test_a_file_that_is_cut_off_or_another(layout, name, content):
    """A share of the file, or what another program wrote."""
    if isinstance(content, float):
        whole = (layout / name).read_bytes()
        content = whole[: int(content * len(whole))]
    (layout / name).write_bytes(content)
    for read in (read_shape, lambda folder: load_base_model(str(folder))):
        with pytest.raises(ValueError, match=rf"{name}: damaged.* To fix, copy it again") as caught:
            read(layout)
        # Torch's own words advise to switch the protection off.
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", CODE_FILES)
def test_code_is_named_and_not_run(name, bge_m3, tmp_path):
    torch.save({"weight": Code(tmp_path / "ran")}, bge_m3 / name)
    for read in (read_shape, lambda folder: load_base_model(str(folder))):
        message = rf"{name}: .*not only tensors.*mkdir.* To fix"
        with pytest.raises(ValueError, match=message) as caught:
            read(bge_m3)
        assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_larger_than_the_embeddings_or_damaged(e5, tokenizer_files):
    """Or of few tokens, of which one has an id that the table has no row for."""
    content = json.loads(tokenizer_files["tokenizer.json"])
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {t: 99 if i == 79 else i for t, i in vocabulary.items()}
    write_json(e5 / "tokenizer.json", content)
    message = (
        r"e5: the tokenizer has 100 tokens but the embeddings have 99 rows\. To fix, use the "
        r"tokenizer and the weights of the same model"
    )
    with pytest.raises(ValueError, match=message):
        load_base_model(str(e5))
    for damaged in (b"", b"{", b"\xff\xfe", b"[]", b'{"version": "1.0"}'):
        (e5 / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tokenizer\.json: .*To fix"):
            load_base_model(str(e5))


@pytest.mark.parametrize("config", [{"model_max_length": 512}, {}, None], ids=str)
def test_special_tokens_that_only_transformers_knows(config, unigram_folder, tmp_path):
    """FacebookAI/xlm-roberta-base is published so: its class has the names, no file does."""
    folder = shutil.copytree(unigram_folder, tmp_path / "base")
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        write_json(folder / "tokenizer_config.json", config)
    files = load_base_model(str(folder)).tokenizer_files
    assert read_special_ids(files) == {0, 1, 2, 3}
    settings = json.loads(files["tokenizer_config.json"])
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>"}
    names |= {"unk": "<unk>", "mask": "<mask>"}
    assert {key: settings[f"{key}_token"] for key in names} == names
    assert settings["tokenizer_class"] == "XLMRobertaTokenizer"
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json", "sentencepiece.bpe.model"}
    check_folder(write_again(folder, tmp_path / "output"), read_shape(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "cls_token, eos_token, pad_token is"),
        ({"pad_token": "</s>"}, "pad_token_id 1, but the tokenizer's </s> has the id 2"),
        ({"tokenizer_class": "CanineTokenizer"}, "does not read the tokenizer .*CanineTok"),
        ({"added_tokens_decoder": 5}, r"not read the tokenizer \(a value of the wrong kind"),
        ({"model_max_length": {}}, r"not read the tokenizer \(a value of the wrong kind"),
    ],
    ids=["unknown", "padding", "slow", "damaged", "length"],
)
def test_tokenizers_that_extraction_would_refuse_after_the_training(
    config, message, unigram_folder, tmp_path
):
    folder = shutil.copytree(unigram_folder, tmp_path / "base")
    (folder / "special_tokens_map.json").unlink()
    write_json(folder / "tokenizer_config.json", config)
    with pytest.raises(ValueError, match=message + r".*To fix"):
        load_base_model(str(folder))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}


@pytest.mark.parametrize("part", ["Metaspace", "byte_fallback", "Lowercase"])
def test_all_tools_read_a_tokenizer_that_transformers_5_builds_anew(
    part, unigram_folder, tmp_path, messages
):
    folder = shutil.copytree(unigram_folder, tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    if part == "Metaspace":
        content["pre_tokenizer"] = METASPACE
    elif part == "Lowercase":
        content["normalizer"] = {"type": "Lowercase"}
    else:
        vocabulary = content["model"]["vocab"]
        content["model"]["byte_fallback"] = True
        for byte in range(256):
            vocabulary[-2 - byte] = [f"<0x{byte:02X}>", -20.0]
    write_json(folder / "tokenizer.json", content)
    base = load_base_model(str(folder))
    assert "transformers takes the tokenizer for a XLMRobertaTokenizer and splits " in messages.text
    output = write_again(folder, tmp_path / "output")
    ours = build_tokenizer(base.tokenizer_files["tokenizer.json"], 512)
    theirs = AutoTokenizer.from_pretrained(output)
    for text in (*DIFFICULT, "🦜 Ein SATZ"):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
    messages.clear()
    assert load_base_model(str(output)).tokenizer_files["tokenizer.json"]
    assert not messages.records


def test_sentence_transformers_alone_writes_in_lower_case(unigram_folder, wordpiece, tmp_path):
    folder = shutil.copytree(unigram_folder, tmp_path / "base")
    edit_json(folder / "sentence_bert_config.json", do_lower_case=True)
    with pytest.raises(
        ForeignModelError, match=r"base: sentence-transformers writes .* To fix, add"
    ):
        load_base_model(str(folder))
    encoder = load_encoder(str(folder))
    assert isinstance(encoder, SentenceTransformerEncoder)
    vectors = encoder.encode(["A PLANE", "a plane"]).dense_vecs
    assert (vectors[0] == vectors[1]).all()
    # Of a tokenizer that does it too, as in BAAI/bge-small-en.
    folder = shutil.copytree(wordpiece.name, tmp_path / "small")
    edit_json(folder / "sentence_bert_config.json", do_lower_case=True)
    assert load_base_model(str(folder)).max_seq_length == 256


def test_settings_of_bert_contradict_its_file(tmp_path, wordpiece):
    """Every version of transformers follows the settings, readers in Rust the file."""
    folder = shutil.copytree(wordpiece.name, tmp_path / "bert")
    edit_json(folder / "tokenizer_config.json", do_lower_case=False)
    with pytest.raises(
        ValueError, match=r"a BertTokenizer and splits 'A Plane.*To fix, make token"
    ):
        load_base_model(str(folder))


def test_shards_are_read_as_one_file(e5, bge_m3, batch, tmp_path):
    for folder, name in ((e5, "model.safetensors"), (bge_m3, "pytorch_model.bin")):
        expected = load_base_model(str(folder)).backbone(**batch)
        path, parts = folder / name, ["x-00001-of-00002", "x-00002-of-00002"]
        binary = path.suffix == ".bin"
        state = torch.load(path, weights_only=True) if binary else load_file(path)
        parts, path_of = [f"{part}{path.suffix}" for part in parts], {}
        for n, part in enumerate(parts):
            kept = {k: v.clone() for k, v in list(state.items())[n::2]}
            (torch.save if binary else save_file)(kept, folder / part)
            path_of |= dict.fromkeys(kept, part)
        path.unlink()
        write_json(folder / f"{name}.index.json", {"metadata": {}, "weight_map": path_of})
        assert read_shape(folder) == (base := load_base_model(str(folder))).shape
        assert torch.equal(base.backbone(**batch), expected)
        (folder / parts[1]).rename(tmp_path / parts[1])
        message = rf"lacks {parts[1]} of 2 shards\. To fix, copy all of them"
        with pytest.raises(FileNotFoundError, match=message):
            load_base_model(str(folder))


def test_the_old_layout_of_sentence_transformers(e5, batch):
    expected = load_base_model(str(e5))
    inner = e5 / "0_Transformer"
    inner.mkdir()
    for path in [path for path in e5.iterdir() if path.is_file()]:
        path.rename(inner / path.name)
    write_json(e5 / "config.json", {"__version__": {"sentence_transformers": "0.3"}})
    types = ("Transformer", "Pooling")
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{t}", "type": f"sentence_transformers.models.{t}"}
        for n, t in enumerate(types)
    ]
    write_json(e5 / "modules.json", modules)
    base = load_base_model(str(e5))
    assert (base.shape, base.max_seq_length, base.heads.pooling) == (expected.shape, 48, "mean")
    assert torch.equal(base.backbone(**batch), expected.backbone(**batch))
    assert load_encoder(str(e5)).encode(["a plane"]).dense_vecs.shape == (1, 32)
    write_json(e5 / "modules.json", [{**modules[0], "path": ""}, modules[1]])
    with pytest.raises(ForeignModelError, match="the module Transformer in '' is not applied"):
        load_base_model(str(e5))


def test_an_adapter_is_not_passed_over(e5):
    """transformers would apply it, also beside full weights."""
    write_json(e5 / "adapter_config.json", {"base_model_name_or_path": "owner/base"})
    message = (
        r"adapter_config\.json: the folder holds a PEFT adapter of owner/base, which would not be "
        r"applied here\. To fix, merge it: .*merge_and_unload"
    )
    write_json(e5 / "modules.json", [])
    for read in (fetch_model_folder, load_base_model, load_encoder, read_shape):
        with pytest.raises(ValueError, match=message + ".*To use the weights beside it alone, rem"):
            read(e5 if read is read_shape else str(e5))
    (e5 / "model.safetensors").unlink()
    (e5 / "config.json").unlink()
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(str(e5))
    assert "beside it" not in str(caught.value)


def test_a_projection_comes_with_the_model_or_nothing_is_loaded(
    projected_folder, model_folder, messages, write_projected, tmp_path
):
    """Vectors would be others than those of sentence-transformers."""
    base = load_base_model(str(projected_folder))
    stored = load_file(projected_folder / "2_Dense" / "model.safetensors")["linear.weight"]
    assert torch.equal(base.projection, stored)
    assert (base.dense_size(), base.shape.hidden_size) == (40, 32)
    assert read_shape(projected_folder) == base.shape
    plain = load_base_model(str(model_folder))
    assert plain.projection is None and plain.dense_size() == 32
    assert not messages.records
    folder = write_projected(tmp_path / "x", torch.eye(40, 16))
    message = (
        r"x/2_Dense: takes vectors of 16 dimensions, but the encoder's have 32\. To fix, use the "
        r"files of the same model"
    )
    with pytest.raises(ValueError, match=message):
        load_base_model(str(folder))
    folder = shutil.copytree(projected_folder, tmp_path / "y")
    edit_json(folder / "2_Dense" / "config.json", bias=True)
    with pytest.raises(ForeignModelError, match=r"2_Dense/config\.json: is not a linear map"):
        load_base_model(str(folder))
    modules = json.loads((folder / "modules.json").read_text())
    modules[2] |= {"type": "sentence_transformers.models.LayerNorm", "path": "2_LayerNorm"}
    write_json(folder / "modules.json", modules)
    message = r"y/modules\.json: the module LayerNorm in '2_LayerNorm' is not applied here"
    with pytest.raises(ForeignModelError, match=message):
        load_base_model(str(folder))


def error_of(kind: type[Exception], text: str) -> Exception:
    """An error of the hub's client as it raises it for an answer of the server."""
    return kind(text, response=SimpleNamespace(headers={}, request=None, status_code=404))


class Hub:
    """Delivers a folder's files and remembers which; ``failure`` is raised instead."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache = files, cache
        self.delivered: list[str] = []
        self.revisions: set[str | None] = set()
        self.failure: Exception | None = None

    def snapshot_download(self, repo_id: str, *, revision=None, allow_patterns=None) -> str:
        assert repo_id == "BAAI/bge-m3"
        names = [str(p.relative_to(self.files)) for p in self.files.rglob("*") if p.is_file()]
        wanted = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)
        for name in wanted:
            self.deliver(name, revision)
        return str(self.cache)

    def hf_hub_download(self, repo_id: str, filename: str, *, revision=None) -> str:
        assert repo_id == "BAAI/bge-m3"
        if not (self.files / filename).exists():
            raise error_of(errors.RemoteEntryNotFoundError, "404 Client Error. Entry Not Found")
        return self.deliver(filename, revision)

    def deliver(self, name: str, revision: str | None) -> str:
        if self.failure is not None:
            raise self.failure
        self.revisions.add(revision)
        self.delivered.append(name)
        (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(self.files / name, self.cache / name)


@pytest.fixture
def nothing_fetched():
    """No test knows what another one has fetched."""
    hub_module._download.cache_clear()
    yield
    hub_module._download.cache_clear()


@pytest.fixture
def hub(bge_m3, tmp_path, monkeypatch, nothing_fetched) -> Hub:
    """A hub that has one model, BAAI/bge-m3."""
    hub = Hub(bge_m3, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    return hub


def test_bge_m3_from_the_hub_and_only_what_is_read_of_it(hub, batch, projected_folder):
    base = load_base_model("BAAI/bge-m3", revision="v1")
    assert base.name == "BAAI/bge-m3"
    assert base.shape.sparse_head and base.shape.colbert_dim == 32
    assert base.heads.pooling == "cls" and base.max_seq_length == 64
    assert "sentencepiece.bpe.model" in base.tokenizer_files
    assert hub.revisions == {"v1"}
    assert (base.license, base.origin) == ("mit", "BAAI/bge-m3")
    assert_equals_hugging_face(hub.cache, batch)
    assert set(hub.delivered) == set(
        "config.json pytorch_model.bin colbert_linear.pt sparse_linear.pt tokenizer.json "
        "tokenizer_config.json special_tokens_map.json sentencepiece.bpe.model modules.json "
        "sentence_bert_config.json 1_Pooling/config.json README.md".split()
    )
    shutil.copytree(projected_folder, hub.files, dirs_exist_ok=True)
    assert read_projection(fetch_model_folder("BAAI/bge-m3")).shape == (40, 32)
    names = ("2_Dense/config.json", "2_Dense/model.safetensors", "3_Normalize/config.json")
    assert set(names) <= set(hub.delivered)


@pytest.mark.parametrize("inner", ["", "0_Transformer/"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards_and_the_old_layout_from_the_hub(name, inner, hub, e5):
    (hub.files / "pytorch_model.bin").unlink()
    names = {"0.bin": "a", "1.bin": "b"}
    (hub.files / inner).mkdir(exist_ok=True)
    write_json(
        hub.files / f"{inner}{name}.index.json", {"weight_map": {v: k for k, v in names.items()}}
    )
    for part in names:
        shutil.copy(e5 / "model.safetensors", hub.files / f"{inner}{part}")
    if inner:
        shutil.copy(hub.files / "config.json", hub.files / inner)
    fetch_model_folder("BAAI/bge-m3", "v1")
    delivered = {f"{inner}{part}" for part in (f"{name}.index.json", *names)}
    assert delivered <= set(hub.delivered) and hub.revisions == {"v1"}
    hub.delivered.clear()
    fetch_model_folder("BAAI/bge-m3", "v1")
    assert not hub.delivered  # one process asks once, and has one version all the time
    hub_module._download.cache_clear()
    fetch_model_folder("BAAI/bge-m3", "v1")
    assert hub.delivered and not delivered & set(hub.delivered)


def test_weights_are_not_downloaded_twice(hub, e5):
    shutil.copy(e5 / "model.safetensors", hub.files)
    assert fetch_model_folder(str(e5)) == e5
    assert not hub.delivered  # a folder is not looked up
    fetch_model_folder("BAAI/bge-m3", "v1")
    assert "model.safetensors" in hub.delivered and "pytorch_model.bin" not in hub.delivered
    assert hub.revisions == {"v1"}


@pytest.mark.parametrize(
    "name",
    ["nothing", " ", "a/b/c", "/none", "./nothing", "../nothing", "a b/c", "~/model", "x\0/y"],
)
def test_neither_folder_nor_hub_name(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = (
        rf"^base_model '{re.escape(name)}' is neither a folder nor a hub name \(owner/name\)\. To "
        rf"fix, check the path; it is relative to {re.escape(str(tmp_path))}\."
    )
    with pytest.raises(FileNotFoundError, match=message):
        fetch_model_folder(name)
    assert not hub.delivered


def test_a_model_that_the_hub_does_not_have(hub):
    message = (
        r"^base_model 'BAAI/bge-m3' is neither a folder here nor a model on the hub\. To fix, "
        r"check the name, or log in with 'hf auth login' if it is private\."
    )
    for kind in (errors.RepositoryNotFoundError, errors.GatedRepoError):
        hub.failure = error_of(kind, "401 Client Error.\n\nRepository Not Found")
        with pytest.raises(OSError, match=message):
            fetch_model_folder("BAAI/bge-m3")


NOT_DELIVERED = (
    r"^base_model '{}' is not in the local cache and the hub did not deliver it \({}.*\)\. To fix, "
    r"run once with a network connection, or fetch it elsewhere with 'hf download {} --local-dir "
    r"FOLDER', copy it here and set model\.base_model=FOLDER\."
)


@pytest.mark.parametrize(
    "failure",
    [
        error_of(errors.RevisionNotFoundError, "404 Client Error.\nRevision Not Found"),
        error_of(errors.HfHubHTTPError, "503 Server Error"),
        errors.LocalEntryNotFoundError("Got: ConnectTimeout"),
        errors.HTTPError("403 Forbidden"),  # what the client lets through: proxies, time-outs
        OSError(28, "No space left on device"),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_does_not_deliver(failure, hub):
    hub.failure = failure
    first = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    name = "BAAI/bge-m3"
    with pytest.raises(OSError, match=NOT_DELIVERED.format(name, re.escape(first), name)):
        fetch_model_folder(name)


@pytest.fixture
def cache(bge_m3, tmp_path, monkeypatch, nothing_fetched) -> Path:
    """The real client, without a network; BAAI/bge-m3 is in its cache. Returns the snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, commit = tmp_path / "hub" / "models--BAAI--bge-m3", "5617a9f61b028005a4858fdac845db4"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(bge_m3, model / "snapshots" / commit))


def test_a_cache_needs_no_network_but_has_to_be_whole(cache, e5, monkeypatch):
    """BAAI/bge-m3 has no ``model.safetensors``, and no hub is there to say so."""
    assert fetch_model_folder("BAAI/bge-m3") == cache
    assert load_base_model("BAAI/bge-m3").shape.hidden_size == 32
    shutil.copy(e5 / "model.safetensors", cache)
    assert fetch_model_folder("BAAI/bge-m3") == cache
    for weights in ("model.safetensors", "pytorch_model.bin"):
        (cache / weights).unlink()
    hub_module._download.cache_clear()
    for name in ("intfloat/multilingual-e5-base", "BAAI/bge-m3"):
        with pytest.raises(OSError, match=NOT_DELIVERED.format(name, "", name)):
            load_base_model(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    name = "intfloat/multilingual-e5-base"
    with pytest.raises(OSError, match=NOT_DELIVERED.format(name, ".*refused", name)):
        load_base_model(name)


def test_why_torch_did_not_read_a_file():
    text = "WeightsUnpickler error: can only append, got <class 'str'>\nmore"
    assert describe_load_error(ValueError(text)).endswith("append, got str")
    for text in ("pass weights_only=False", ""):
        assert describe_load_error(ValueError(text)).endswith("ValueError")
