"""Back to the dimensions of the original."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file

from bge_pruning.model_io.projection import (
    ForeignModuleError,
    compute_modules,
    compute_selection,
    fit_projection,
    project,
    read_projection,
    write_projection,
)

KEPT = [0, 2, 3, 7]
PROJECTION = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_kept_dimensions_return_to_their_places():
    vectors = F.normalize(torch.randn(5, 4), dim=1)
    found = project(vectors, compute_selection(KEPT, 9))
    assert found.shape == (5, 9)
    torch.testing.assert_close(found[:, KEPT], vectors)
    gone = [i for i in range(9) if i not in KEPT]
    assert not found[:, gone].any()
    torch.testing.assert_close(found @ found.T, vectors @ vectors.T)


def test_a_fitted_map_comes_nearer_but_not_with_too_few_texts():
    generator = np.random.default_rng(0)
    true = generator.normal(size=(9, 4))
    pruned = unit(generator.normal(size=(400, 4)))
    original = unit(pruned @ true.T)
    fitted = project(torch.from_numpy(pruned), fit_projection(pruned, original, KEPT))
    plain = project(torch.from_numpy(pruned), compute_selection(KEPT, 9))
    target = torch.from_numpy(original)
    assert (fitted * target).sum(1).mean() > 0.95 > (plain * target).sum(1).mean()
    generator = np.random.default_rng(1)
    pruned = unit(generator.normal(size=(50, 4)))
    original = np.zeros((50, 9))
    original[:, KEPT] = pruned
    found = fit_projection(pruned, original, KEPT)
    torch.testing.assert_close(found, compute_selection(KEPT, 9), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="3 different texts do not determine a map from 4 dim"):
        fit_projection(np.ones((3, 4)), np.ones((3, 9)), KEPT)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps(compute_modules(projected=True)))
    write_projection(tmp_path, PROJECTION)
    return tmp_path


def change(folder, **changes):
    path = folder / "2_Dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_map_on_disk_is_that_which_modules_json_names(folder):
    assert torch.equal(read_projection(folder), PROJECTION)
    # As newer versions write it, and in half precision.
    change(folder, module_input_name="sentence_embedding", module_output_name="sentence_embedding")
    path = folder / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": PROJECTION.half()}, path)
    assert torch.equal(read_projection(folder), PROJECTION.half().float())
    (folder / "modules.json").write_text(json.dumps(compute_modules(projected=False)))
    assert read_projection(folder) is None
    (folder / "modules.json").unlink()
    assert read_projection(folder) is None


def test_a_map_is_float32_on_disk_and_its_file_can_be_read_by_a_server(tmp_path):
    write_projection(tmp_path, PROJECTION.half())
    (found,) = load_file(tmp_path / "2_Dense" / "model.safetensors").values()
    assert found.dtype == torch.float32
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "2_Dense").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "torch.nn.modules.activation.Tanh"},
        {"activation_function": None},  # which sentence-transformers takes for Tanh
        {"bias": True},
        {"bias": None},
        {"module_input_name": "token_embeddings"},
        {"module_output_name": "scores"},
        {"use_residual": True},
    ],
    ids=str,
)
def test_a_dense_module_of_another_kind(changes, folder):
    change(folder, **changes)
    message = "is not a linear map without bias .* To fix, use sent"
    with pytest.raises(ForeignModuleError, match=message):
        read_projection(folder)


def test_sizes_that_the_config_does_not_name_and_damage(folder):
    change(folder, out_features=8)
    message = r"holds .*\(9, 4\)}, but its config.json says .*\(8, 4\)}. To fix, use the files"
    with pytest.raises(ValueError, match=message):
        read_projection(folder)
    path = folder / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": PROJECTION, "linear.bias": torch.zeros(9)}, path)
    with pytest.raises(ValueError, match=r"holds .*'linear.bias': \(9,\).*, but its config.json s"):
        read_projection(folder)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"safetensors: damaged or not complete \(.*\). To f"):
        read_projection(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no such file. To fix, copy the whole model fold"):
        read_projection(folder)
    (folder / "2_Dense" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="2_Dense/config.json: no such file. To fix, choo"):
        read_projection(folder)
