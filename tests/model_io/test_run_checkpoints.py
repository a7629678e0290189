"""Which checkpoint a run goes on from, and the gates of one as arrays."""

import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_pruning.model_io.checkpoint import load_trained_model
from bge_pruning.model_io.run_checkpoints import (
    check_whole,
    find_whole_checkpoint,
    list_checkpoints,
    write_gates,
)
from bge_pruning.models.structural_pruning import AXES


def write(folder: Path, *batches: int) -> list[Path]:
    """Checkpoints, the link on the last one."""
    paths = []
    for batch in batches:
        state = {"model": {"weight": torch.full((4096,), float(batch))}, "timestamp": {}}
        paths.append(folder / f"ba{batch}-rank0.pt")
        torch.save({"state": state}, paths[-1])
    (folder / "latest-rank0.pt").unlink(missing_ok=True)
    (folder / "latest-rank0.pt").symlink_to(paths[-1].name)
    return paths


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit of a weight."""
    content = bytearray(path.read_bytes())
    place = content.index(torch.full((8,), 8.0).numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def code(path: Path) -> None:
    """Something else than tensors and plain values."""
    torch.save({"state": {"model": Path("x")}}, path)


def test_the_newest_comes_first_by_its_number(tmp_path):
    write(tmp_path, 4, 8, 12)
    for name in ("best-rank0.pt", "ba3-rank1.pt", "ba9.pt", "ba7-rank0.pt.damaged"):
        (tmp_path / name).write_bytes(b"")
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == ["ba12-rank0.pt", "ba8-rank0.pt", "ba4-rank0.pt"]


@pytest.mark.parametrize("damage", [cut, flip, empty, code])
def test_of_a_damaged_newest_one_the_one_before_is_taken(damage, tmp_path, caplog):
    paths = write(tmp_path, 4, 8)
    damage(paths[-1])
    with pytest.raises(ValueError, match=r"ba8-rank0\.pt: damaged"):
        check_whole(paths[-1])
    with caplog.at_level(logging.WARNING, "bge_pruning"):
        assert find_whole_checkpoint(tmp_path) == paths[0]
    assert os.readlink(tmp_path / "latest-rank0.pt") == "ba4-rank0.pt"
    assert (tmp_path / "ba8-rank0.pt.damaged").is_file() and not paths[-1].exists()
    assert "It is renamed to ba8-rank0.pt.damaged." in caplog.text
    assert "going on from" in caplog.text and "ba4-rank0.pt" in caplog.text


@pytest.mark.parametrize("link", [None, "ba4-rank0.pt", "ba8-rank0.pt", "ba99-rank0.pt"])
def test_the_link_is_put_on_the_newest_and_all_else_is_left(link, tmp_path, caplog):
    """Killed between a checkpoint and its link; or the link is right, or its file is gone."""
    paths = write(tmp_path, 4, 8)
    (tmp_path / "latest-rank0.pt").unlink()
    if link is not None:
        (tmp_path / "latest-rank0.pt").symlink_to(link)
    assert find_whole_checkpoint(tmp_path) == paths[-1]
    assert os.readlink(tmp_path / "latest-rank0.pt") == "ba8-rank0.pt"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ba4-rank0.pt", "ba8-rank0.pt", "latest-rank0.pt"}
    assert not caplog.records


def test_all_damaged(tmp_path):
    for path in write(tmp_path, 4, 8):
        cut(path)
    message = r"all its 2 checkpoints are damaged.*To fix, restore one of them, or start again"
    with pytest.raises(ValueError, match=message):
        find_whole_checkpoint(tmp_path)


def test_without_a_whole_first_checkpoint_a_run_starts_again(tmp_path, caplog):
    (path,) = write(tmp_path, 4)
    (tmp_path / "latest-rank0.pt").unlink()  # made when the file is complete
    cut(path)
    with caplog.at_level(logging.WARNING, "bge_pruning"):
        assert find_whole_checkpoint(tmp_path) is None
    assert "killed while it wrote its first checkpoint: starting again" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["ba4-rank0.pt.damaged"]
    (tmp_path / "ba4-rank0.pt.damaged").unlink()
    (tmp_path / "latest-rank0.pt").symlink_to("ba4-rank0.pt")
    assert find_whole_checkpoint(tmp_path) is None
    assert find_whole_checkpoint(tmp_path / "absent") is None
    assert not list(tmp_path.iterdir())


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
