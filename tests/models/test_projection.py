"""Back to the dimensions of the original."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bge_pruning.models.projection import (
    compute_selection,
    fit_projection,
    project,
    read_projection,
    write_projection,
)

KEPT = [0, 2, 3, 7]


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_kept_dimensions_return_to_their_places():
    vectors = F.normalize(torch.randn(5, 4), dim=1)
    found = project(vectors, compute_selection(KEPT, 9))
    assert found.shape == (5, 9)
    torch.testing.assert_close(found[:, KEPT], vectors)
    gone = [i for i in range(9) if i not in KEPT]
    assert not found[:, gone].any()


def test_cosines_of_a_selection_are_those_of_the_pruned_model():
    vectors = F.normalize(torch.randn(5, 4), dim=1)
    found = project(vectors, compute_selection(KEPT, 9))
    torch.testing.assert_close(found @ found.T, vectors @ vectors.T)


def test_a_fitted_map_comes_nearer():
    generator = np.random.default_rng(0)
    true = generator.normal(size=(9, 4))
    pruned = unit(generator.normal(size=(400, 4)))
    original = unit(pruned @ true.T)
    fitted = project(torch.from_numpy(pruned), fit_projection(pruned, original, KEPT))
    plain = project(torch.from_numpy(pruned), compute_selection(KEPT, 9))
    target = torch.from_numpy(original)
    assert (fitted * target).sum(1).mean() > 0.95 > (plain * target).sum(1).mean()


def test_a_perfect_selection_is_not_changed():
    generator = np.random.default_rng(1)
    pruned = unit(generator.normal(size=(50, 4)))
    original = np.zeros((50, 9))
    original[:, KEPT] = pruned
    found = fit_projection(pruned, original, KEPT)
    torch.testing.assert_close(found, compute_selection(KEPT, 9), atol=1e-6, rtol=0)


def test_too_few_texts():
    with pytest.raises(ValueError, match="3 different texts do not determine a map from 4 dim"):
        fit_projection(np.ones((3, 4)), np.ones((3, 9)), KEPT)


def test_a_folder_keeps_its_map(tmp_path):
    projection = torch.randn(9, 4)
    assert read_projection(tmp_path) is None
    write_projection(tmp_path, projection)
    assert torch.equal(read_projection(tmp_path), projection)


def test_a_dense_module_of_another_kind(tmp_path):
    write_projection(tmp_path, torch.randn(9, 4))
    path = tmp_path / "2_Dense" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "activation_function": "torch.nn.Tanh"}))
    with pytest.raises(ValueError, match="is not a linear map without bias .* To fix, use sent"):
        read_projection(tmp_path)
