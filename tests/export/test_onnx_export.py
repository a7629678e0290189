"""A graph in a model folder: valid, the same numbers, all or nothing."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_pruning.evaluation.encoders import load_encoder
from bge_pruning.evaluation.onnx_encoder import open_session, run_session
from bge_pruning.export import onnx_export
from bge_pruning.export.onnx_export import (
    OnnxExportError,
    check_differences,
    check_runtime,
    compare_with_torch,
    describe_comparison,
    export_onnx,
    write_graph,
)
from bge_pruning.export.onnx_graph import GraphBuilder
from bge_pruning.model_io.pretrained import load_base_model
from tests.common.files import contents

TEXTS = ["the man plays guitar", "a", "the woman reads a red book"]
ROOT = Path(__file__).parents[2]


def test_what_is_written_and_said(folder, messages, tmp_path):
    before = contents(folder)
    with messages.at_level("INFO"):
        info = export_onnx(folder)
    after = contents(folder)
    assert set(after) == {*before, "onnx/model.onnx"}
    assert {name: after[name] for name in before} == before
    written = info.as_dict()
    assert json.loads(json.dumps(written)) == written
    worst = info.largest_difference
    names = ["last_hidden_state", "dense_vecs", "token_weights", "colbert_vecs"]
    assert info.outputs == list(worst) == names
    assert 0 < max(worst.values()) <= info.tolerance == 1e-5
    assert info.file == "onnx/model.onnx" and info.data is None
    assert info.bytes == len(after["onnx/model.onnx"])
    assert info.opset == 17
    assert info.versions["onnx"] == onnx.__version__
    assert "onnx/model.onnx beside torch: largest difference" in messages.text
    (tmp_path / "new").touch()
    mode = (tmp_path / "new").stat().st_mode
    assert (folder / "onnx" / "model.onnx").stat().st_mode == mode
    base = load_base_model(str(folder))
    (folder / "model.safetensors").unlink()
    assert export_onnx(folder, base, overwrite=True).file == info.file


@pytest.fixture
def projected(projected_folder, tmp_path) -> Path:
    return Path(shutil.copytree(projected_folder, tmp_path / "projected"))


def test_dense_vectors_are_projected(projected):
    """The ONNX backend of sentence-transformers applies its modules to the hidden states."""
    info = export_onnx(projected)
    assert info.outputs[1] == "dense_vecs" and info.outputs[-1] == "sentence_embedding"
    assert 0 < info.largest_difference["dense_vecs"] <= 1e-5
    files = [projected / "onnx" / "model.onnx", projected]
    ours, theirs = (load_encoder(str(path)).encode(TEXTS).dense_vecs for path in files)
    assert ours.shape == (3, 40)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(str(projected / "onnx" / "model.onnx"))
    ids = torch.from_numpy(encoder.tokenize(TEXTS[:1])[0].astype(np.int64))[None]
    mask = torch.ones_like(ids)
    found = run_session(encoder.session, ids, mask, ("last_hidden_state", "dense_vecs"))
    hidden = torch.from_numpy(found["last_hidden_state"])
    features = {"token_embeddings": hidden, "attention_mask": mask}
    for module in list(SentenceTransformer(str(projected), device="cpu"))[1:]:
        features = module(features)
    expected = features["sentence_embedding"].detach()
    np.testing.assert_allclose(found["dense_vecs"], expected, atol=1e-6)


def test_a_projection_may_lie_beside_the_graph(projected, outside):
    assert export_onnx(projected).data == "onnx/model.onnx_data"
    model = onnx.load(projected / "onnx" / "model.onnx", load_external_data=False)
    (weight,) = [w for w in model.graph.initializer if w.name == "projection.weight"]
    assert weight.data_location == onnx.TensorProto.EXTERNAL


@pytest.fixture
def outside(monkeypatch) -> None:
    """As if the model were larger than one file may be."""
    assert onnx_export.SINGLE_FILE_BYTES < 2**31 - 2**26  # the graph comes on top
    monkeypatch.setattr(onnx_export, "SINGLE_FILE_BYTES", 1000)


def test_large_models_keep_their_weights_beside_the_graph(outside, folder, tmp_path):
    info = export_onnx(folder)
    assert info.data == "onnx/model.onnx_data"
    path, data = folder / "onnx" / "model.onnx", folder / "onnx" / "model.onnx_data"
    assert info.bytes == path.stat().st_size + data.stat().st_size
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)  # the graph names the file without its folder
    path = moved / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    apart = [w for w in model.graph.initializer if w.data_location == onnx.TensorProto.EXTERNAL]
    entries = [{entry.key: entry.value for entry in weight.external_data} for weight in apart]
    assert {entry["location"] for entry in entries} == {"model.onnx_data"}
    assert all(int(entry["offset"]) % 4096 == 0 for entry in entries)
    names = {weight.name for weight in apart}
    assert len(names) == 5 + 4 * 16 + 4  # embeddings, layers, heads; constants stay inside
    whole = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer}
    table = load_file(moved / "model.safetensors")["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(whole["embeddings.word_embeddings.weight"], table)
    assert max(compare_with_torch(load_base_model(str(moved)), path).values()) <= 1e-5


def test_both_ways_give_the_same_numbers(folder, monkeypatch):
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1]])
    found = []
    for limit in (10**9, 1000):
        monkeypatch.setattr(onnx_export, "SINGLE_FILE_BYTES", limit)
        export_onnx(folder, overwrite=True)
        session = open_session(folder / "onnx" / "model.onnx")
        found.append(run_session(session, ids, ids.ne(1).long(), ("dense_vecs", "colbert_vecs")))
    for name, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][name])


@pytest.fixture
def damage(monkeypatch):
    """A function that has every written graph changed before it is compared."""
    write = onnx_export.write_graph

    def damage(change) -> None:
        def write_and_change(base, folder):
            model = write(base, folder)
            change(folder)
            return model

        monkeypatch.setattr(onnx_export, "write_graph", write_and_change)

    return damage


def shift(name: str, where: object = (..., 0)):
    def change(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        (weight,) = [w for w in model.graph.initializer if w.name == name]
        array = onnx.numpy_helper.to_array(weight).copy()
        array[where] += 0.01  # of all alike, a LayerNorm would take off again
        weight.CopyFrom(onnx.numpy_helper.from_array(array, name))
        onnx.save(model, folder / "model.onnx")

    return change


@pytest.mark.parametrize(
    ("weight", "output"),
    [
        ("encoder.layer.2.output.dense.bias", "last_hidden_state"),
        ("sparse_linear.bias", "token_weights"),
        ("colbert_linear.bias", "colbert_vecs"),
        ("embeddings.position_embeddings.weight", "dense_vecs"),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_graph_that_computes_something_else_is_not_delivered(
    weight, output, earlier, folder, damage
):
    """An earlier export is kept."""
    if earlier:
        export_onnx(folder)
    damage(shift(weight))
    before = contents(folder)
    with pytest.raises(OnnxExportError, match=rf"differs from the model by .*{output} \d\.\d\d"):
        export_onnx(folder, overwrite=earlier)
    assert contents(folder) == before
    assert not list(folder.glob(".onnx*"))


def change_weights(pattern: str, change):
    """Change the weights of a written graph that a pattern names."""

    def change_file(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        chosen = [w for w in model.graph.initializer if re.fullmatch(pattern, w.name)]
        assert chosen
        for weight in chosen:
            array = change(onnx.numpy_helper.to_array(weight))
            weight.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), weight.name))
        onnx.save(model, folder / "model.onnx")

    return change_file


def change_epsilon(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-5
    onnx.save(model, folder / "model.onnx")


def tanh_gelu(builder: GraphBuilder, x: str) -> str:
    cube = builder.node("Mul", x, builder.node("Mul", x, x))
    inner = builder.node("Add", x, builder.node("Mul", cube, builder.constant(0.044715)))
    scaled = builder.node("Mul", inner, builder.constant(np.sqrt(2 / np.pi).item()))
    sign = builder.node("Add", builder.node("Tanh", scaled), builder.constant(1.0))
    return builder.node("Mul", builder.node("Mul", x, sign), builder.constant(0.5))


WRONG = {
    "transposed": change_weights(r".*layer\.1\.attention\.self\.key\.weight", lambda w: w.T),
    "no bias": change_weights(r".*layer\.1\.attention\.self\.query\.bias", np.zeros_like),
    "positions": change_weights(".*position_embeddings.*", lambda w: np.roll(w, 1, axis=0)),
    "fp16": change_weights(".*weight", lambda w: w.astype(np.float16).astype(np.float32)),
    "epsilon": change_epsilon,
    "constant": change_weights(r"constant_float32_1\.414.*", lambda w: w * np.float32(1.0001)),
    "tanh": None,
}


@pytest.fixture(params=["normal", "magnifying"])
def conditioned(request, folder) -> Path:
    """The tiny model with all biases, and with attention so sharp that it magnifies rounding."""
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    sharp = 0.3 if request.param == "normal" else 1.5
    for name, value in state.items():
        if name.endswith(("query.weight", "key.weight")):
            state[name] = sharp * torch.randn(value.shape, generator=generator)
        elif name.endswith(("query.bias", "key.bias")):
            state[name] = 0.1 * torch.randn(value.shape, generator=generator)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_right_graph_is_told_from_wrong_ones_whatever_float32_does(
    conditioned, request, monkeypatch
):
    info = export_onnx(conditioned)
    worst, said = max(info.largest_difference.values()), describe_comparison(info)
    if "normal" in request.node.name:
        assert worst <= 1e-5 and info.float64 is None and said.endswith("float32")
    else:
        assert worst > 1e-5 and max(info.float64.graph.values()) < 1e-9
        assert re.fullmatch(r"largest difference \d\.\de-1\d, float64; from that .* in torch", said)
    for change in WRONG.values():
        if change is None:
            monkeypatch.setattr(GraphBuilder, "gelu", tanh_gelu)
        with monkeypatch.context() as context:
            if change is not None:
                context.setattr(onnx_export, "write_graph", and_then(change))
            with pytest.raises(OnnxExportError, match="the ONNX graph differs from the model by"):
                export_onnx(conditioned, overwrite=True)


def and_then(change):
    def write(base, folder):
        model = write_graph(base, folder)
        change(folder)
        return model

    return write


def test_a_runtime_that_rounds_much_more_than_torch_is_refused():
    check_runtime({"a": 3e-3, "b": 9e-6}, {"a": 1e-4, "b": 1e-9})
    message = (
        r"float32 is more than 32 times as far from it as torch's: a 4\.00e-03 \(torch 1\.00e-04"
    )
    with pytest.raises(OnnxExportError, match=message):
        check_runtime({"a": 4e-3, "b": 9e-6}, {"a": 1e-4, "b": 1e-9})
    with pytest.raises(OnnxExportError, match=r"b nan"):
        check_runtime({"b": float("nan")}, {"b": 1.0})


def interrupt(folder: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("limit", [10**9, 1000])
def test_an_interrupted_export_or_a_wrong_projection_leaves_nothing(
    limit, projected, damage, monkeypatch
):
    before = contents(projected)
    monkeypatch.setattr(onnx_export, "SINGLE_FILE_BYTES", limit)
    damage(interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(projected)
    monkeypatch.setattr(onnx_export, "SINGLE_FILE_BYTES", 10**9)
    damage(shift("projection.weight", (0, 0)))
    with pytest.raises(OnnxExportError, match=r"by more than 1e-05: dense_vecs \d\.\d\de-\d\d. To"):
        export_onnx(projected)
    assert contents(projected) == before


def test_weights_that_are_no_numbers_are_not_delivered(folder):
    state = load_file(folder / "model.safetensors")
    state["encoder.layer.0.output.dense.bias"][0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OnnxExportError, match="last_hidden_state nan.*To fix, look for NaN"):
        export_onnx(folder)
    assert not (folder / "onnx").exists()


def test_an_earlier_export_is_kept_or_replaced_whole(folder, outside):
    export_onnx(folder)
    assert (folder / "onnx" / "model.onnx_data").is_file()
    with pytest.raises(FileExistsError, match=r"onnx exists and is kept\. To fix, choose another"):
        export_onnx(folder)
    (folder / "onnx" / "model_quantized.onnx").write_text("of the old weights")
    onnx_export.SINGLE_FILE_BYTES = 10**9
    export_onnx(folder, overwrite=True)
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model.onnx"]


def test_a_missing_library_is_named_before_the_model_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is not installed.*\[onnx\]"):
        export_onnx(tmp_path)


def test_every_difference_is_named():
    fine = {"a": 1e-5, "b": 0.0}
    check_differences(fine)
    message = r"^the ONNX graph differs from the model by more than 1e-05: c 1\.10e-05, d nan\. To"
    with pytest.raises(OnnxExportError, match=message):
        check_differences({**fine, "c": 1.1e-5, "d": float("nan")})


def test_batches_of_the_comparison(folder):
    """Mixed lengths, the longest text that the model reads, and one text alone."""
    base = load_base_model(str(folder))
    batches = list(onnx_export._batches(base))
    lengths = [mask.sum(1).tolist() for _, mask in batches]
    assert len(set(lengths[0])) > 4
    assert lengths[1][0] == base.max_seq_length == 128
    assert min(lengths[1]) < 6
    assert len(lengths[2]) == 1
    for ids, mask in batches:
        assert (ids.eq(1) == mask.eq(0)).all()


@pytest.mark.slow
def test_a_real_model_as_float32_and_int8(tmp_path):
    from bge_pruning.datasets.sts_dataloader import read_sts
    from bge_pruning.export.onnx_quantize import export_onnx_int8
    from bge_pruning.model_io.example_models import MINILM, prepare

    folder = prepare(MINILM, tmp_path / "minilm", ROOT / "data" / "sts" / "stsb-en-train.csv")
    info = export_onnx(folder)
    assert max(info.largest_difference.values()) < 2e-6
    pairs = read_sts(ROOT / "data" / "sts" / "stsb-en-test.csv")
    found = export_onnx_int8(folder, (pairs.sentences1, pairs.sentences2, pairs.scores))
    assert found.bytes < 0.27 * info.bytes
    assert found.cosine.dense_vecs.mean > 0.985
    assert found.spearman.float32 == pytest.approx(0.8203, abs=5e-5)
    assert abs(found.spearman.change) < 0.01
