"""Every demand of the servers, broken one by one."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from bge_pruning.export.folder_check import FolderError, check_folder
from bge_pruning.model_io.model_folder import write_model_folder
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.model_io.projection import compute_modules


@pytest.fixture(scope="module")
def shape(model_folder):
    return load_base_model(str(model_folder)).shape


def write(source, folder):
    base = load_base_model(str(source))
    folder.mkdir()
    parts = (base.backbone, base.heads, base.shape, base.hf_config, base.tokenizer_files)
    write_model_folder(folder, *parts, base.max_seq_length, projection=base.projection)
    return folder


@pytest.fixture
def folder(model_folder, tmp_path):
    return write(model_folder, tmp_path / "model")


@pytest.fixture
def projected(projected_folder, tmp_path):
    """A folder with a map of the dense vectors."""
    return write(projected_folder, tmp_path / "projected")


def edit(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_written_folders_meet_every_demand_of_their_own_shape(folder, projected, shape):
    check_folder(folder, shape)
    check_folder(projected, shape)
    message = r"word_embeddings.weight is \(99, 32\), expected \(98, 32\)"
    with pytest.raises(FolderError, match=message):
        check_folder(folder, replace(shape, vocab_size=98))
    with pytest.raises(FolderError, match="2_Dense takes 32 dimensions, but the model has 24"):
        check_folder(projected, replace(shape, hidden_size=24, num_attention_heads=3))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("initializer_range", None, "config.json lacks initializer_range, which text-embeddings"),
        ("hidden_dropout_prob", None, "lacks hidden_dropout_prob"),
        ("num_attention_heads", 2, "num_attention_heads is 2, but the model has 4"),
        ("num_hidden_layers", 3, "num_hidden_layers is 3, but the model has 4"),
        ("max_position_embeddings", 99, "max_position_embeddings is 99"),
        ("model_type", "bert", "model_type is 'bert', expected 'xlm-roberta'"),
        ("architectures", ["XLMRobertaForMaskedLM"], r"architectures is not \['XLMRobertaModel'\]"),
        ("position_embedding_type", None, "position_embedding_type is not 'absolute'"),
        ("pad_token_id", 2, "padding token has not the id that config.json names"),
    ],
)
def test_config(key, value, message, folder, shape):
    edit(folder / "config.json", **{key: value})
    with pytest.raises(FolderError, match=f"{message}.*To fix, extract"):
        check_folder(folder, shape)


def lose_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    few = {k: v for k, v in weights.items() if not k.startswith("encoder.layer.3.")}
    save_file(few, folder / "model.safetensors")


def add_a_token(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["surplus"] = 99
    (folder / "tokenizer.json").write_text(json.dumps(content))


def truncate(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(16)
    tokenizer.save(str(folder / "tokenizer.json"))


def narrow_the_head(folder):
    torch.save(torch.nn.Linear(32, 16).state_dict(), folder / "colbert_linear.pt")


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def set_pooling(**changes):
    return lambda folder: edit(folder / "1_Pooling" / "config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_layer, "holds 3 layers, expected 4: transformers would ignore"),
        (remove("model.safetensors"), "there is no model.safetensors"),
        (remove("sparse_linear.pt"), r"sparse_linear.pt is None, .*: FlagEmbedding would take ran"),
        (remove("colbert_linear.pt"), r"colbert_linear.pt is None, .*: FlagEmbedding would take r"),
        (narrow_the_head, r"colbert_linear.pt is \(16, 32\), expected \(32, 32\)"),
        (remove("tokenizer.json"), "no tokenizer.json: FlagEmbedding would read every word"),
        (add_a_token, "tokenizer.json has id 99, beyond the 99 rows"),
        (set_pooling(pooling_mode_mean_tokens=None), "1_Pooling/config.json lacks pooling_mode_m"),
        (set_pooling(word_embedding_dimension=16), "word_embedding_dimension is not 32"),
        (remove("modules.json"), "no modules.json: sentence-transformers would take the"),
        (
            lambda folder: (folder / "modules.json").write_text("{"),
            r"modules\.json is not JSON \(.*\)",
        ),
        (
            lambda folder: edit(folder / "sentence_bert_config.json", max_seq_length=512),
            "max_seq_length is 512, but there are positions for 128",
        ),
        (
            lambda folder: edit(folder / "tokenizer_config.json", model_max_length=None),
            r"tokenizer_config\.json: model_max_length is None, but there are positions for 128",
        ),
        (truncate, r"tokenizer\.json stores truncation or padding, which readers in Rust follow"),
        (remove("tokenizer.json", "modules.json"), r"no tokenizer\.json.*no modules\.json"),
        (
            lambda folder: [path.unlink() for path in folder.rglob("*.json")],
            r"config\.json lacks",  # copied in part
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_server_would_refuse_or_misread(damage, message, folder, shape):
    damage(folder)
    with pytest.raises(FolderError, match=message):
        check_folder(folder, shape)


@pytest.mark.parametrize("kind", ["folder", "projected"])
@pytest.mark.parametrize(
    "change",
    [
        lambda modules: modules[:-1],
        lambda modules: [modules[0], *modules[:0:-1]],
        lambda modules: [*modules, {**modules[-1], "path": "4_Normalize"}],
        lambda modules: [*modules[:-1], {**modules[-1], "type": "custom.Normalize"}],
        lambda modules: {"modules": modules},
    ],
    ids=["no normalisation", "order", "twice", "class", "layout"],
)
def test_modules_that_compute_something_else(change, kind, shape, request):
    folder = request.getfixturevalue(kind)
    path = folder / "modules.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    message = r"modules\.json does not list exactly .*models\.Transformer, .* give other vectors"
    with pytest.raises(FolderError, match=message):
        check_folder(folder, shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": True}, r"2_Dense/config\.json: is not a linear map without bias"),
        ({"in_features": 8}, r"2_Dense/model\.safetensors: holds .*, but its config\.json says"),
        ({"activation_function": "torch.nn.Identity"}, "activation_function is not 'torch.nn.mod"),
    ],
    ids=str,
)
def test_a_projection_that_is_read_otherwise(change, message, projected, shape):
    edit(projected / "2_Dense" / "config.json", **change)
    with pytest.raises(FolderError, match=message):
        check_folder(projected, shape)


def test_a_module_without_its_folder_weights_or_name(projected, shape):
    for name in ("1_Pooling", "2_Dense", "3_Normalize"):
        away = (projected / name).rename(projected.with_name(name))
        with pytest.raises(FolderError, match=f"there is no {name}/config.json, of a module of s"):
            check_folder(projected, shape)
        away.rename(projected / name)
    (projected / "2_Dense" / "model.safetensors").unlink()
    message = r"2_Dense/model\.safetensors: no such file\. To fix, ext"
    with pytest.raises(FolderError, match=message):
        check_folder(projected, shape)
    (projected / "modules.json").write_text(json.dumps(compute_modules(projected=False)))
    with pytest.raises(FolderError, match=r"does not list exactly .*models\.Dense, .*: sentence"):
        check_folder(projected, shape)
