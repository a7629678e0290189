"""Every demand of the servers, broken one by one."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_pruning.export.folder_check import FolderError, check_folder
from bge_pruning.model_io.model_folder import write_model_folder
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.model_io.projection import compute_modules


@pytest.fixture(scope="module")
def shape(model_folder):
    return load_base_model(str(model_folder)).shape


@pytest.fixture
def folder(model_folder, tmp_path):
    base = load_base_model(str(model_folder))
    (tmp_path / "model").mkdir()
    write_model_folder(
        *(tmp_path / "model", base.backbone, base.heads, base.shape, base.hf_config),
        *(base.tokenizer_files, base.max_seq_length),
    )
    return tmp_path / "model"


@pytest.fixture
def projected(projected_folder, tmp_path):
    """A folder with a map of the dense vectors that meets every demand."""
    base = load_base_model(str(projected_folder))
    (tmp_path / "projected").mkdir()
    write_model_folder(
        *(tmp_path / "projected", base.backbone, base.heads, base.shape, base.hf_config),
        *(base.tokenizer_files, base.max_seq_length),
        projection=base.projection,
    )
    return tmp_path / "projected"


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_written_folder_meets_every_demand(folder, shape):
    check_folder(folder, shape)


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


def test_a_missing_or_surplus_layer(folder, shape):
    weights = load_file(folder / "model.safetensors")
    few = {k: v for k, v in weights.items() if not k.startswith("encoder.layer.3.")}
    save_file(few, folder / "model.safetensors")
    with pytest.raises(FolderError, match="holds 3 layers, expected 4: transformers would ignore"):
        check_folder(folder, shape)


def test_embeddings_of_another_size(folder, shape):
    message = r"word_embeddings.weight is \(99, 32\), expected \(98, 32\)"
    with pytest.raises(FolderError, match=message):
        check_folder(folder, replace(shape, vocab_size=98))


def test_no_weights(folder, shape):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FolderError, match="there is no model.safetensors"):
        check_folder(folder, shape)


@pytest.mark.parametrize("name", ["sparse_linear", "colbert_linear"])
def test_a_missing_head(name, folder, shape):
    (folder / f"{name}.pt").unlink()
    with pytest.raises(
        FolderError, match=f"{name}.pt is None, .*: FlagEmbedding would take random"
    ):
        check_folder(folder, shape)


def test_a_head_of_another_size(folder, shape):
    torch.save(torch.nn.Linear(32, 16).state_dict(), folder / "colbert_linear.pt")
    with pytest.raises(FolderError, match=r"colbert_linear.pt is \(16, 32\), expected \(32, 32\)"):
        check_folder(folder, shape)


def test_no_tokenizer(folder, shape):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FolderError, match="no tokenizer.json: FlagEmbedding would read every word"):
        check_folder(folder, shape)


def test_a_tokenizer_of_another_model(folder, shape):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["surplus"] = 99
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FolderError, match="tokenizer.json has id 99, beyond the 99 rows"):
        check_folder(folder, shape)


def test_sentence_transformers_files(folder, shape):
    edit(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=None)
    with pytest.raises(FolderError, match="1_Pooling/config.json lacks pooling_mode_mean_tokens"):
        check_folder(folder, shape)
    edit(folder / "1_Pooling" / "config.json", word_embedding_dimension=16)
    with pytest.raises(FolderError, match="word_embedding_dimension is not 32"):
        check_folder(folder, shape)
    (folder / "modules.json").unlink()
    with pytest.raises(FolderError, match="no modules.json: sentence-transformers would take the"):
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


def test_modules_that_are_no_json(folder, shape):
    (folder / "modules.json").write_text("{")
    with pytest.raises(FolderError, match=r"modules\.json is not JSON \(.*\)"):
        check_folder(folder, shape)


@pytest.mark.parametrize("name", ["1_Pooling", "2_Dense", "3_Normalize"])
def test_a_module_without_its_folder(name, projected, shape):
    shutil.rmtree(projected / name)
    with pytest.raises(FolderError, match=f"there is no {name}/config.json, of a module of sent"):
        check_folder(projected, shape)


def test_a_projected_folder_meets_every_demand(projected, shape):
    check_folder(projected, shape)


def test_a_projection_that_modules_json_does_not_name(projected, shape):
    (projected / "modules.json").write_text(json.dumps(compute_modules(projected=False)))
    with pytest.raises(FolderError, match=r"does not list exactly .*models\.Dense, .*: sentence"):
        check_folder(projected, shape)


def test_a_projection_of_another_model(projected, shape):
    with pytest.raises(FolderError, match="2_Dense takes 32 dimensions, but the model has 24"):
        check_folder(projected, replace(shape, hidden_size=24, num_attention_heads=3))


def test_a_projection_without_its_weights(projected, shape):
    (projected / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(
        FolderError, match=r"2_Dense/model\.safetensors: no such file\. To fix, ext"
    ):
        check_folder(projected, shape)


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


def test_texts_longer_than_the_positions(folder, shape):
    edit(folder / "sentence_bert_config.json", max_seq_length=512)
    with pytest.raises(FolderError, match="max_seq_length is 512, but there are positions for 128"):
        check_folder(folder, shape)


def test_every_problem_is_named_at_once(folder, shape):
    (folder / "tokenizer.json").unlink()
    (folder / "modules.json").unlink()
    with pytest.raises(FolderError, match=r"no tokenizer\.json.*no modules\.json"):
        check_folder(folder, shape)


def test_a_folder_that_was_copied_in_part(folder, shape, tmp_path):
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.json"))
    with pytest.raises(FolderError, match=r"config\.json lacks"):
        check_folder(tmp_path / "copy", shape)
