"""int8 beside float32: what becomes int8, what it loses, all or nothing."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from scipy.stats import spearmanr

from bge_pruning.evaluation.encoders import load_encoder
from bge_pruning.evaluation.onnx_encoder import OnnxEncoder
from bge_pruning.evaluation.scoring import score_tasks
from bge_pruning.evaluation.search import MODES
from bge_pruning.evaluation.tasks import beir_task
from bge_pruning.export import onnx_export, onnx_quantize
from bge_pruning.export.onnx_export import export_onnx
from bge_pruning.export.onnx_quantize import (
    WORDS,
    describe_loss,
    export_onnx_int8,
    measure_int8,
    quantised,
)

PAIRS = (
    ["the man plays guitar", "a dog runs", "the woman reads", "a cat sings slowly"],
    ["the man plays", "a horse rides fast", "the woman reads a red book", "never here today"],
    [4.0, 1.5, 4.5, 0.0],
)


@pytest.fixture
def exported(folder) -> Path:
    export_onnx(folder)
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}


def test_what_is_written_and_said(exported, messages, collection):
    before = names(exported)
    with messages.at_level("INFO"):
        record = export_onnx_int8(exported, PAIRS, rounds=1)
    info = record.as_dict()
    assert names(exported) == before | {"onnx/model_quantized.onnx"}
    assert json.loads(json.dumps(info)) == info
    path = exported / "onnx" / "model_quantized.onnx"
    assert info["file"] == "onnx/model_quantized.onnx"
    assert info["bytes"] == path.stat().st_size
    assert info["bytes_float32"] == (exported / "onnx" / "model.onnx").stat().st_size
    assert info["settings"] == {"per_channel": True, "reduce_range": True, "embeddings": "rows"}
    assert info["texts"] == 8 and info["spearman"]["pairs"] == 4
    assert set(info["cosine"]) == {"dense_vecs", "token_weights", "colbert_vecs"}
    for row in info["cosine"].values():
        assert 0.9 < row["min"] <= row["mean"] < 1.0
    assert info["speed"]["throughput_texts_per_s"]["ratio"] > 0
    assert f"model_quantized.onnx: {describe_loss(record)}" in messages.text
    assert "pre-processing" not in messages.text  # ONNX Runtime's advice is not for our graph
    found = info["spearman"]
    for key, file in (("float32", "model.onnx"), ("int8", "model_quantized.onnx")):
        encoder = load_encoder(str(exported / "onnx" / file))
        a, b = (encoder.encode(part).dense_vecs for part in PAIRS[:2])
        expected = spearmanr((a * b).sum(1), PAIRS[2]).statistic
        assert found[key] == pytest.approx(expected)
    assert found["change"] == found["int8"] - found["float32"]
    model = onnx.load(exported / "onnx" / "model_quantized.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["MatMulInteger"] == 4 * 6
    assert kinds["MatMul"] == 4 * 2 + 2  # attention itself, and the heads
    large = {name: array for name, array in weights(model).items() if array.size > 500}
    floats = {name for name, array in large.items() if array.dtype != np.int8}
    assert floats == {"embeddings.position_embeddings.weight", "colbert_linear.weight"}
    assert model.ir_version == 8
    assert {(o.domain, o.version) for o in model.opset_import} <= {("", 17), ("ai.onnx.ml", 3)}
    encoder = load_encoder(str(exported / "onnx" / "model_quantized.onnx"))
    assert isinstance(encoder, OnnxEncoder)
    scores = score_tasks(encoder, [beir_task(collection)], list(MODES))
    assert len(scores) == len(MODES)


def test_without_pairs_and_in_the_place_of_an_earlier_file(exported):
    """The sentences of extraction are compared where there are no pairs."""
    info = export_onnx_int8(exported, rounds=1)
    assert info.texts == 8 and info.spearman is None
    assert "Spearman" not in describe_loss(info)
    path = exported / "onnx" / "model_quantized.onnx"
    path.write_text("earlier")
    with pytest.raises(FileExistsError, match=r"model_quantized\.onnx exists\. To fix, choose"):
        export_onnx_int8(exported)
    assert path.read_text() == "earlier"
    assert export_onnx_int8(exported, overwrite=True, rounds=1).bytes == path.stat().st_size


def test_a_projection_stays_float32(projected_folder, tmp_path):
    folder = shutil.copytree(projected_folder, tmp_path / "projected")
    export_onnx(folder)
    info = export_onnx_int8(folder, PAIRS, rounds=1)
    assert info.cosine.dense_vecs.min > 0.9
    path = folder / "onnx" / "model_quantized.onnx"
    assert weights(onnx.load(path))["projection.weight"].dtype == np.float32
    encoder = load_encoder(str(path))
    assert encoder.encode(["the man plays guitar"]).dense_vecs.shape == (1, 40)


def test_numbers_are_near_those_of_float32(exported):
    table = weights(onnx.load(exported / "onnx" / "model.onnx"))[WORDS]
    with quantised(exported) as path:
        found = weights(onnx.load(path))
    rows, scale = found[f"{WORDS}_int8"], found[f"{WORDS}_scale"]
    assert WORDS not in found
    assert rows.dtype == np.int8 and scale.dtype == np.float32
    assert not table[1].any() and not rows[1].any()  # of the padding token
    assert np.isfinite(scale).all()
    assert (np.abs(table - rows * scale) <= 0.5001 * scale).all()
    assert np.abs(rows).max() == 127
    query = "encoder.layer.0.attention.self.query.weight"
    assert found[f"{query}_scale"].size == 32
    assert np.abs(found[f"{query}_quantized"].astype(int)).max() <= 64


def test_only_heads_that_exist(copy_without):
    folder = copy_without("sparse_linear", "colbert_linear")
    export_onnx(folder)
    assert set(export_onnx_int8(folder, rounds=1).cosine.as_dict()) == {"dense_vecs"}


def test_a_sparse_head_that_says_nothing_has_no_cosine(exported):
    state = torch.load(exported / "sparse_linear.pt", weights_only=True)
    torch.save({**state, "bias": torch.tensor([-1000.0])}, exported / "sparse_linear.pt")
    export_onnx(exported, overwrite=True)
    assert "token_weights" not in export_onnx_int8(exported, rounds=1).cosine.as_dict()


def test_a_graph_is_needed_and_may_have_its_weights_apart(folder, monkeypatch):
    before = names(folder)
    message = r"onnx/model\.onnx: no such file\. To fix, export the model first: int8 is made from"
    with pytest.raises(FileNotFoundError, match=message):
        export_onnx_int8(folder)
    assert names(folder) == before
    monkeypatch.setattr(onnx_export, "SINGLE_FILE_BYTES", 1000)
    export_onnx(folder)
    before = names(folder)
    info = export_onnx_int8(folder, rounds=1)
    assert names(folder) == before | {"onnx/model_quantized.onnx"}
    data = folder / "onnx" / "model.onnx_data"
    assert info.bytes_float32 == (folder / "onnx" / "model.onnx").stat().st_size + (
        data.stat().st_size
    )
    onnx.checker.check_model(str(folder / "onnx" / "model_quantized.onnx"), full_check=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_or_too_many_weights_leave_nothing(error, exported, monkeypatch):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(onnx_quantize, "measure_int8", fail)
    before = names(exported)
    with pytest.raises(error):
        export_onnx_int8(exported)
    monkeypatch.setattr(onnx_quantize, "SINGLE_FILE_BYTES", 1000)
    message = r"model\.onnx: 0\.0 GB of int8 weights are more than one .* To fix, use the float32"
    with pytest.raises(ValueError, match=message):
        export_onnx_int8(exported)
    assert names(exported) == before


TEXTS = ["a dog runs in the park", "the cat", "three women sing here today and never there"]


@pytest.fixture
def encoder(folder) -> OnnxEncoder:
    export_onnx(folder)
    return OnnxEncoder(folder / "onnx" / "model.onnx", batch_size=2)


@pytest.fixture
def no_speed(monkeypatch) -> None:
    monkeypatch.setattr(onnx_quantize, "measure_speed", lambda *args, rounds: {"rounds": rounds})


def test_pairs_have_the_prompt_of_sts(encoder, no_speed, monkeypatch):
    seen = []
    monkeypatch.setattr(encoder, "prompts", {"prompts": {"STS": "s: "}})
    monkeypatch.setattr(onnx_quantize, "_cosines", lambda a, b, texts: seen.extend(texts))
    measure_int8(encoder, encoder, (TEXTS, TEXTS, [1, 5, 2]))
    assert seen == [f"s: {text}" for text in TEXTS]


def test_cosines_are_of_texts_and_of_real_tokens(encoder, no_speed):
    """A file loses nothing beside itself."""
    found = measure_int8(encoder, encoder, (TEXTS, TEXTS[::-1], [1, 5, 2]), rounds=3)
    assert found["texts"] == 3
    for row in found["cosine"].values():
        assert row == pytest.approx({"mean": 1.0, "min": 1.0}, abs=1e-6)
    assert found["spearman"]["change"] == 0.0
    assert found["speed"] == {"rounds": 3}
    assert set(found["versions"]) == {"onnx", "onnxruntime"}
    turned = Turned(encoder.path, batch_size=2)
    found = measure_int8(turned, encoder, (TEXTS, TEXTS[::-1], [1, 5, 2]))["cosine"]
    for name in ("dense_vecs", "colbert_vecs"):
        assert found[name] == pytest.approx({"mean": 0.8, "min": 0.8}, abs=1e-5)
    assert found["token_weights"] == pytest.approx({"mean": 1.0, "min": 1.0}, abs=1e-5)
    assert np.isfinite([value for row in found.values() for value in row.values()]).all()


class Turned(OnnxEncoder):
    """Turns each vector in a plane by an angle, and padding into noise."""

    def compute(self, ids, mask, names):
        outputs = super().compute(ids, mask, names)
        for name in {"dense_vecs", "colbert_vecs"} & set(names):
            vectors = outputs[name]
            across = torch.randn_like(vectors)
            across -= (across * vectors).sum(-1, keepdim=True) * vectors
            across /= across.norm(dim=-1, keepdim=True)
            outputs[name] = 0.8 * vectors + 0.6 * across
        if "token_weights" in names:
            outputs["token_weights"] = 3.0 * outputs["token_weights"]
        return outputs
