"""Files that ONNX Runtime is given."""

import sys

import pytest
import torch

from bge_pruning.evaluation.onnx_encoder import open_session
from bge_pruning.export.onnx_export import MODEL, write_graph
from bge_pruning.model_io.pretrained import load_base_model


@pytest.fixture(scope="module")
def file(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    write_graph(load_base_model(str(model_folder)), folder)
    return folder / MODEL


def test_it_has_as_many_threads_as_torch_and_they_do_not_spin(file):
    options = open_session(file).get_session_options()
    assert options.intra_op_num_threads == torch.get_num_threads()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu"])
def test_a_device_without_support(file, device, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    message = rf"model\.onnx: the installed ONNX Runtime cannot run on {device}\. To fix, pass --d"
    with pytest.raises(ValueError, match=message):
        open_session(file, device)


def test_a_damaged_file(file, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.onnx: cannot be loaded \(.+\)\. To fix, export"):
        open_session(path)


def test_a_missing_library(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="onnxruntime is not installed"):
        open_session(file)
