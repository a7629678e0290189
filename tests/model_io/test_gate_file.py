"""The gates of a run as arrays."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bge_pruning.model_io.checkpoint import load_trained_model
from bge_pruning.model_io.run_checkpoints import write_gates
from bge_pruning.models.structural_pruning import AXES

# sigmoid(log_alpha + SHIFT) is the probability of an open gate.
SHIFT = -2 / 3 * math.log(0.1 / 1.1)


def test_gates_are_written(run, target_shape, tmp_path):
    write_gates(run, tmp_path / "gates.npz")
    with np.load(tmp_path / "gates.npz", allow_pickle=False) as arrays:
        written = {name: arrays[name] for name in arrays.files}
    assert set(written) == {*AXES, *(f"{axis}_kept" for axis in AXES)}
    module = load_trained_model(run / "latest-rank0.pt").l0_module
    sizes = {"head": 2, "hidden": 16, "intermediate": 32, "layer": 2}
    for axis, log_alpha in module.log_alpha.items():
        gates = log_alpha.detach().numpy()
        expected = 1 / (1 + np.exp(-(gates + SHIFT)))
        np.testing.assert_allclose(written[axis], expected, rtol=0, atol=1e-6)
        kept = written[f"{axis}_kept"]
        assert kept.dtype == bool
        # The largest of every row, of layers that are cut too.
        rows = np.atleast_2d(gates), np.atleast_2d(kept)
        for values, mask in zip(*rows, strict=True):
            assert mask.sum() == sizes[axis]
            assert values[mask].min() > values[~mask].max()


def test_gates_of_some_axes_or_none_are_written(
    metadata, save_run, target_shape, tiny_shape, tmp_path
):
    target = replace(tiny_shape, num_hidden_layers=2)
    arguments = {**metadata.l0_module, "axes": ["layer"], "target": vars(target)}
    run = save_run(replace(metadata, l0_module=arguments))
    write_gates(run / "latest-rank0.pt", tmp_path / "gates.npz")
    with np.load(tmp_path / "gates.npz") as arrays:
        assert set(arrays.files) == {"layer", "layer_kept"}
    run = save_run(replace(metadata, l0_module=None))
    (tmp_path / "gates.npz").unlink()
    with pytest.raises(ValueError, match=r"run: is a run without gates\. To fix, name another run"):
        write_gates(run, tmp_path / "gates.npz")
    assert not (tmp_path / "gates.npz").exists()


def test_a_write_that_fails_leaves_the_earlier_file(run, tmp_path, monkeypatch):
    path = tmp_path / "gates.npz"
    write_gates(run, path)
    before = path.read_bytes()

    def fill_the_disk(target, **arrays):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_gates(run, path)
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"run", "gates.npz"}
