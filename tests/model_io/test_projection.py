"""Back to the dimensions of the original."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file

from bge_pruning.model_io.projection import (
    ForeignModelError,
    Module,
    check_modules,
    compute_modules,
    compute_selection,
    fit_projection,
    project,
    read_modules,
    read_projection,
    write_projection,
)
from tests.common.files import edit_json

KEPT = [0, 2, 3, 7]
PROJECTION = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_kept_dimensions_return_and_a_fitted_map_comes_nearer():
    vectors = F.normalize(torch.randn(5, 4), dim=1)
    found = project(vectors, compute_selection(KEPT, 9))
    assert found.shape == (5, 9)
    torch.testing.assert_close(found[:, KEPT], vectors)
    gone = [i for i in range(9) if i not in KEPT]
    assert not found[:, gone].any()
    torch.testing.assert_close(found @ found.T, vectors @ vectors.T)
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


def test_a_map_on_disk_is_that_which_modules_json_names(tmp_path, folder):
    half = tmp_path / "half"
    half.mkdir()
    write_projection(half, PROJECTION.half())
    (found,) = load_file(half / "2_Dense" / "model.safetensors").values()
    assert found.dtype == torch.float32
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (half / "2_Dense").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}
    assert torch.equal(read_projection(folder), PROJECTION)
    # As newer versions write it, and in half precision.
    edit_json(
        folder / "2_Dense" / "config.json",
        module_input_name="sentence_embedding",
        module_output_name="sentence_embedding",
    )
    path = folder / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": PROJECTION.half()}, path)
    assert torch.equal(read_projection(folder), PROJECTION.half().float())
    (folder / "modules.json").write_text(json.dumps(compute_modules(projected=False)))
    assert read_projection(folder) is None
    (folder / "modules.json").unlink()
    assert read_projection(folder) is None


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
    edit_json(folder / "2_Dense" / "config.json", **changes)
    message = "is not a linear map without bias .* To fix, use sent"
    with pytest.raises(ForeignModelError, match=message):
        read_projection(folder)


def test_sizes_that_the_config_does_not_name_and_damage(folder):
    edit_json(folder / "2_Dense" / "config.json", out_features=8)
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


OURS = ["", "1_Pooling", "2_Dense", "3_Normalize"]
# As sentence-transformers 6 saves them.
LONG = [
    ("sentence_transformers.base.modules.transformer.Transformer", ""),
    ("sentence_transformers.sentence_transformer.modules.pooling.Pooling", "1_Pooling"),
    ("sentence_transformers.base.modules.dense.Dense", "2_Dense"),
    ("sentence_transformers.base.modules.normalize.Normalize", "3_Normalize"),
]


def write(folder, *modules):
    entries = [{"idx": n, "path": path, "type": kind} for n, (kind, path) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("projected", "paths"), [(True, OURS), (False, ["", "1_Pooling", "2_Normalize"])]
)
def test_what_is_written_is_applied(projected, paths, tmp_path):
    """With the four types by which text-embeddings-inference tells modules, and no others."""
    written = compute_modules(projected)
    assert [module["path"] for module in written] == paths
    assert [(module["idx"], module["name"]) for module in written] == [
        (n, str(n)) for n in range(len(paths))
    ]
    known = [f"sentence_transformers.models.{path.partition('_')[2]}" for path in paths[1:]]
    types = [module["type"] for module in written]
    assert types == ["sentence_transformers.models.Transformer", *known]
    (tmp_path / "modules.json").write_text(json.dumps(written))
    assert [module.path for module in check_modules(tmp_path)] == paths


def test_modules_that_are_applied(tmp_path):
    """Vectors that are not normalised have the same similarities by cosine."""
    assert read_modules(tmp_path) == check_modules(tmp_path) == []
    write(tmp_path, *LONG)
    expected = [Module(kind.rpartition(".")[2], path) for kind, path in LONG]
    assert check_modules(tmp_path) == expected
    write(tmp_path, *LONG[:2])
    assert len(check_modules(tmp_path)) == 2


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        ([*LONG[:2], ("sentence_transformers.models.LayerNorm", "2_LayerNorm")], "LayerNorm"),
        ([*LONG[:2], ("custom.Dense", "2_Dense")], r"custom\.Dense"),
        ([*LONG[:2], (LONG[2][0], "2_Dense_1024")], "Dense in '2_Dense_1024'"),
        ([*LONG, (LONG[2][0], "2_Dense")], "Dense in '2_Dense'"),
        ([*LONG[:2], LONG[3], LONG[2]], "Dense in '2_Dense'"),
        ([LONG[0], (LONG[1][0], "pooling")], "Pooling in 'pooling'"),
        ([(LONG[0][0], "0_Transformer")], "Transformer in '0_Transformer'"),
    ],
    ids=["kind", "class", "path", "twice", "order", "pooling", "transformer"],
)
def test_a_module_that_is_not_applied(modules, named, tmp_path):
    write(tmp_path, *modules)
    message = rf"modules\.json: the module {named}.* is not applied here, .* To fix, choose another"
    with pytest.raises(ForeignModelError, match=message):
        check_modules(tmp_path)


@pytest.mark.parametrize("text", ["{", "7", '["Dense"]', '[{"path": ""}]', '[{"type": 3}]', '"a"'])
def test_a_file_of_another_kind(text, tmp_path):
    (tmp_path / "modules.json").write_text(text)
    message = r"modules\.json: is not a list of modules with path and type \(.*\)\. To fix, copy it"
    with pytest.raises(ValueError, match=message):
        read_modules(tmp_path)
