"""What is measured of two files of one model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bge_pruning.evaluation.onnx_encoder import OnnxEncoder
from bge_pruning.export import onnx_quantize as int8_loss
from bge_pruning.export.onnx_export import export_onnx
from bge_pruning.export.onnx_quantize import measure_int8

TEXTS = ["a dog runs in the park", "the cat", "three women sing here today and never there"]


@pytest.fixture
def encoder(folder) -> OnnxEncoder:
    export_onnx(folder)
    return OnnxEncoder(folder / "onnx" / "model.onnx", batch_size=2)


@pytest.fixture(autouse=True)
def no_speed(monkeypatch) -> None:
    monkeypatch.setattr(int8_loss, "measure_speed", lambda *args, rounds: {"rounds": rounds})


def test_a_file_loses_nothing_beside_itself(encoder):
    found = measure_int8(encoder, encoder, (TEXTS, TEXTS[::-1], [1, 5, 2]), rounds=3)
    assert found["texts"] == 3
    for row in found["cosine"].values():
        assert row == pytest.approx({"mean": 1.0, "min": 1.0}, abs=1e-6)
    assert found["spearman"]["change"] == 0.0
    assert found["speed"] == {"rounds": 3}
    assert set(found["versions"]) == {"onnx", "onnxruntime"}


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


def test_cosines_are_of_texts_and_of_real_tokens(encoder):
    turned = Turned(encoder.path, batch_size=2)
    found = measure_int8(turned, encoder, (TEXTS, TEXTS[::-1], [1, 5, 2]))["cosine"]
    for name in ("dense_vecs", "colbert_vecs"):
        assert found[name] == pytest.approx({"mean": 0.8, "min": 0.8}, abs=1e-5)
    assert found["token_weights"] == pytest.approx({"mean": 1.0, "min": 1.0}, abs=1e-5)
    assert np.isfinite([value for row in found.values() for value in row.values()]).all()
