"""Checkpoint folders of sharded runs: read whole, without running what they hold."""

import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from bge_pruning.model_io.checkpoint import find_checkpoint, load_state, load_trained_model
from bge_pruning.model_io.run_checkpoints import find_whole_checkpoint, list_checkpoints
from bge_pruning.model_io.sharded_checkpoint import (
    METADATA_FILE,
    check_whole_folder,
    is_sharded,
    read_metadata,
)
from tests.common.code import Code

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


def write(folder: Path, state: dict) -> Path:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


@pytest.fixture
def content(metadata, build_checkpoint) -> dict:
    content = build_checkpoint(metadata)
    content["state"]["callbacks"] = dict(content["state"]["callbacks"])
    content["state"]["optimizers"] = {"AdamW": {"step": torch.ones(3)}}
    return content


@pytest.fixture
def folder(content, tmp_path) -> Path:
    return write(tmp_path / "run" / "ep0-ba12", content)


def change(folder: Path, edit) -> None:
    """Write the description of the parts again, changed."""
    metadata = read_metadata(folder)
    edit(metadata)
    metadata.storage_meta = None
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))


def test_a_folder_is_found_and_read_as_a_file_is(folder, content, tmp_path, assert_same):
    torch.save(content, tmp_path / "x.pt")
    first, second = load_trained_model(tmp_path / "x.pt"), load_trained_model(folder)
    assert second.metadata == first.metadata
    assert (second.shape, second.batch) == (first.shape, 12)
    for name in ("backbone", "heads", "l0_module"):
        states = [getattr(model, name).state_dict() for model in (first, second)]
        assert_same(dict(states[0]), dict(states[1]))
    assert "optimizers" not in load_state(folder)["state"]
    run = folder.parent
    (run / "latest-rank0.pt").symlink_to(folder.name)
    assert is_sharded(folder) and not is_sharded(run)
    assert find_checkpoint(run).resolve() == folder == find_checkpoint(folder)


def test_no_code_is_run(folder, content, tmp_path):
    (folder / METADATA_FILE).write_bytes(pickle.dumps(Code(tmp_path / "made")))
    with pytest.raises(ValueError, match=r"posix.mkdir is not a type of a checkpoint.*To fix, use"):
        load_trained_model(folder)
    content["state"]["timestamp"]["Timestamp"]["batch"] = Code(tmp_path / "made")
    with pytest.raises(ValueError, match=r"To fix, use an earlier checkpoint"):
        load_state(write(tmp_path / "ep0-ba1", content))  # from the parts
    assert not (tmp_path / "made").exists()


def test_no_file_outside_is_read(folder):
    def edit(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = "../secret"

    change(folder, edit)
    with pytest.raises(ValueError, match=r"'\.\./secret' is not a file of the folder"):
        load_state(folder)


def forget(name: str, metadata: Any) -> None:
    """Leave out where the parts of a value are."""
    for index in [i for i in metadata.storage_data if i.fqn == name]:
        del metadata.storage_data[index]


def test_a_part_that_is_missing_is_said(folder):
    name = "state.model.backbone.encoder.layer.0.attention.self.query.weight"

    change(folder, partial(forget, name))
    with pytest.raises(ValueError, match=rf"0 of \d+ numbers of {name} are there"):
        load_state(folder)
    change(folder, lambda metadata: metadata.planner_data.update(x=("state", "timestamp", "x")))
    with pytest.raises(ValueError, match="damaged, not complete"):
        load_state(folder)


def test_a_value_that_is_missing_is_said(folder):
    change(folder, partial(forget, "state.timestamp.Timestamp.batch"))
    with pytest.raises(ValueError, match=r"state\.timestamp\.Timestamp\.batch is missing"):
        load_state(folder)


def flip(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    weight = load_state(folder)["state"]["model"]["backbone.encoder.layer.0.output.dense.weight"]
    content[content.index(weight.numpy().tobytes()[:64])] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    os.truncate(path, path.stat().st_size // 2)


def lose_description(folder: Path) -> None:
    (folder / METADATA_FILE).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "the checksum of state.model.backbone.encoder.layer.0.output.dense.weight is wrong"),
        (cut, "ends too early"),
        (lose_description, "No such file"),
    ],
)
def test_damage_is_found(damage, message, folder):
    check_whole_folder(folder)
    damage(folder)
    with pytest.raises(ValueError, match=rf"ep0-ba12: damaged or not complete \(.*{message}"):
        check_whole_folder(folder)


def test_a_run_goes_on_from_the_newest_whole_folder(folder, content):
    run = folder.parent
    newer = write(run / "ep1-ba20", content)
    (run / "latest-rank0.pt").symlink_to(newer.name)
    assert list_checkpoints(run) == [newer, folder]
    lose_description(newer)  # killed while the ranks were writing
    assert find_whole_checkpoint(run) == folder
    assert os.readlink(run / "latest-rank0.pt") == folder.name
    assert (run / "ep1-ba20.damaged").is_dir()
