"""ONNX files among the models to evaluate."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bge_pruning.evaluation.encoders import (
    check_model_name,
    count_parameters,
    load_encoder,
    untrained_encoder,
)
from bge_pruning.evaluation.evaluate import evaluate, size_on_disk
from bge_pruning.evaluation.multi_vector import encode_queries
from bge_pruning.evaluation.onnx_encoder import OnnxEncoder, open_session
from bge_pruning.evaluation.scoring import score_tasks
from bge_pruning.evaluation.search import MODES
from bge_pruning.evaluation.tasks import beir_task, sts_task
from bge_pruning.export.onnx_export import export_onnx

TEXTS = ["the man plays guitar", "a", "the woman reads a red book in the park", "the the dog the"]
BOTH = ("dense_vecs", "token_weights")


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory) -> Path:
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("exported") / "model")
    export_onnx(folder)
    return folder


@pytest.fixture(scope="module")
def file(folder) -> Path:
    return folder / "onnx" / "model.onnx"


def test_outputs_are_those_of_the_folder(folder, file):
    ours, theirs = (load_encoder(str(name), batch_size=2) for name in (file, folder))
    assert isinstance(ours, OnnxEncoder)
    assert ours.names() == theirs.names()
    found, expected = ours.encode(TEXTS, BOTH), theirs.encode(TEXTS, BOTH)
    np.testing.assert_allclose(found.dense_vecs, expected.dense_vecs, atol=1e-5)
    difference = found.lexical_weights - expected.lexical_weights
    assert abs(difference).max() < 1e-5
    assert found.lexical_weights.nnz == expected.lexical_weights.nnz
    late = [encode_queries(encoder, TEXTS).vectors for encoder in (ours, theirs)]
    torch.testing.assert_close(*late, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(ours.word_table(), theirs.word_table())


def test_what_it_reads_from_the_folder(folder, file):
    ours, theirs = (load_encoder(str(name), max_length=9) for name in (file, folder))
    for name in ("special_ids", "prompts", "max_length", "batch_size", "device"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert load_encoder(str(file)).max_length == 128
    assert ours.encode(TEXTS * 2).truncated == theirs.encode(TEXTS * 2).truncated == 2
    assert count_parameters(ours) == count_parameters(theirs)
    first, second = (untrained_encoder(encoder, 1) for encoder in (ours, theirs))
    assert first.max_length == 9
    np.testing.assert_array_equal(first.encode(TEXTS).dense_vecs, second.encode(TEXTS).dense_vecs)


def test_scores_are_those_of_the_folder_in_every_mode(folder, file, collection, sts_csv):
    for task in (beir_task(collection), sts_task(sts_csv)):
        ours, theirs = (
            score_tasks(load_encoder(str(name)), [task], list(MODES)) for name in (file, folder)
        )
        assert len(ours) == len(MODES)
        for key, score in theirs.items():
            assert ours[key].values == pytest.approx(score.values, abs=1e-5), key


def test_an_evaluation_beside_the_folder(folder, file, sts_csv):
    result = evaluate(str(file), str(folder), [sts_task(sts_csv)], batch_size=8)
    assert result.tasks[0].retention == pytest.approx(1.0, abs=1e-4)
    assert result.size_bytes["model"] == file.stat().st_size
    assert result.parameters.model == result.parameters.baseline
    assert result.speed.memory_bytes.model == {"weights": file.stat().st_size, "activations": None}
    assert result.speed.throughput_texts_per_s.ratio > 0


def test_a_projected_folder(projected_folder, tmp_path, sts_csv):
    folder = shutil.copytree(projected_folder, tmp_path / "projected")
    export_onnx(folder)
    names = [str(folder / "onnx" / "model.onnx"), str(folder)]
    ours, theirs = (load_encoder(name, batch_size=2) for name in names)
    assert ours.dense_size == theirs.dense_size == 40
    found, expected = ours.encode(TEXTS, BOTH), theirs.encode(TEXTS, BOTH)
    np.testing.assert_allclose(found.dense_vecs, expected.dense_vecs, atol=1e-5)
    assert ours.word_table().shape == (99, 32)
    assert count_parameters(ours) == count_parameters(theirs)
    first, second = (untrained_encoder(encoder, 1).encode(TEXTS) for encoder in (ours, theirs))
    assert first.dense_vecs.shape == (4, 40)
    np.testing.assert_array_equal(first.dense_vecs, second.dense_vecs)
    result = evaluate(*names, [sts_task(sts_csv)], batch_size=8)
    assert result.tasks[0].retention == pytest.approx(1.0, abs=1e-4)
    weights = ("model.safetensors", "2_Dense/model.safetensors", "*_linear.pt")
    sizes = [file.stat().st_size for name in weights for file in folder.glob(name)]
    assert len(sizes) == 4 and result.size_bytes["baseline"] == sum(sizes)
    memory = result.speed.memory_bytes.baseline["weights"]
    assert memory == 4 * count_parameters(theirs)["total"]


def test_files_of_other_exporters(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "x") / "onnx" / "model.onnx"
    model = onnx.load(path)
    del model.graph.output[1:]
    onnx.save(model, path)
    message = r"has the outputs last_hidden_state, expected dense_vecs\. To fix, export it with"
    with pytest.raises(ValueError, match=message):
        load_encoder(str(path))
    # One that gives the ids as vectors, which have no fixed size.
    helper, types, axes = onnx.helper, onnx.TensorProto, ["batch_size", "sequence_length"]
    graph = helper.make_graph(
        [helper.make_node("Cast", ["input_ids"], ["dense_vecs"], to=types.FLOAT)],
        "ids",
        [helper.make_tensor_value_info("input_ids", types.INT64, axes)],
        [helper.make_tensor_value_info("dense_vecs", types.FLOAT, axes)],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)
    message = r"dense_vecs has the shape .*_length'\], expected a fixed size of vectors\. To fix, e"
    with pytest.raises(ValueError, match=message):
        load_encoder(str(path))


def test_weights_beside_the_file_and_a_file_beside_the_weights(folder, file, tmp_path):
    path = shutil.copy(file, tmp_path / "model.onnx")
    (tmp_path / "model.onnx_data").write_bytes(b"12345")
    assert size_on_disk(str(path)) == file.stat().st_size + 5
    # A file at the top of the folder, where Optimum's own export puts it.
    flat = shutil.copytree(folder, tmp_path / "flat")
    shutil.move(flat / "onnx" / "model.onnx", flat)
    assert load_encoder(str(flat / "model.onnx")).folder == flat.resolve()


def test_files_that_are_not_there_or_not_in_a_complete_folder(folder, file, tmp_path):
    message = r"model\.onnx: no such file\. To fix, export the model with extract_pruned_model\.py"
    for name in (tmp_path / "model.onnx", "small/model.onnx"):
        with pytest.raises(FileNotFoundError, match=message):
            check_model_name(str(name))
    (tmp_path / "a" / "b").mkdir(parents=True)
    path = shutil.copy(file, tmp_path / "a" / "b" / "model.onnx")
    with pytest.raises(FileNotFoundError, match=r"is not in a model's folder .* To fix, keep it"):
        load_encoder(str(path))
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x" / "modules.json").unlink()
    with pytest.raises(ValueError, match=r"x has no modules\.json, so its pooling is unknown"):
        load_encoder(str(tmp_path / "x" / "onnx" / "model.onnx"))


def test_a_session_has_as_many_threads_as_torch_and_they_do_not_spin(file):
    options = open_session(file).get_session_options()
    assert options.intra_op_num_threads == torch.get_num_threads()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_what_cannot_be_opened(file, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.onnx: cannot be loaded \(.+\)\. To fix, export"):
        open_session(path)
    providers = ["CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    for device in ("cuda", "cuda:1", "tpu"):
        message = rf"model\.onnx: the installed ONNX Runtime cannot run on {device}\. To fix, pass"
        with pytest.raises(ValueError, match=message):
            open_session(file, device)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="onnxruntime is not installed"):
        open_session(file)
