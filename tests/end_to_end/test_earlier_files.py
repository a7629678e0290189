"""Files that an earlier version wrote (revision 5e8902a) are still read: model, run and records.

``tests/data/before_the_move`` holds a tiny base model, two steps of a run on it (checkpoint with
the optimizer's state, configuration, histories, gates) and the model folder extracted from it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bge_pruning.config.load import load_config
from bge_pruning.export.extract import extract
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.reports.report import write_report
from bge_pruning.train import train

EARLIER = Path(__file__).parents[1] / "data" / "before_the_move"
SIZES = {"num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 3}


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> Path:
    """A copy of the files to work in, as the configuration names them relative to its folder."""
    folder = shutil.copytree(EARLIER, tmp_path / "earlier", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    heads = {
        f"{name}.{key}": value
        for name in ("colbert_linear", "sparse_linear")
        for key, value in torch.load(folder / f"{name}.pt", weights_only=True).items()
    }
    return load_file(folder / "model.safetensors") | heads


def test_the_model_folder_loads_here_and_in_transformers():
    from transformers import AutoModel

    ours = load_base_model(str(EARLIER / "model"))
    theirs = AutoModel.from_pretrained(EARLIER / "model")
    assert {name: getattr(ours.shape, name) for name in SIZES} == SIZES
    assert {name: getattr(theirs.config, name) for name in SIZES} == SIZES
    ids = torch.tensor([[0, 5, 9, 30, 2]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(ours.backbone(ids, mask), expected)


def test_the_checkpoint_extracts_to_the_same_model(earlier, assert_same):
    extract(earlier / "runs/tiny", earlier / "again")
    assert_same(tensors(EARLIER / "model"), tensors(earlier / "again"))
    before, now = (
        json.loads((folder / "pruning.json").read_text())
        for folder in (EARLIER / "model", earlier / "again")
    )
    for key in ("source", "source_shape", "shape", "parameters", "kept", "constraint", "batches"):
        assert now[key] == before[key]


def test_the_run_resumes_to_its_new_end(earlier):
    overrides = ["autoresume=true", "max_duration=4ba"]
    run = train(load_config(["runs/tiny/config.yaml"], overrides))
    state = torch.load(run / "latest-rank0.pt", weights_only=False)["state"]
    assert state["timestamp"]["Timestamp"]["batch"] == 4
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in (EARLIER / run / "metrics.jsonl").read_text().splitlines()]
    assert [row for row in rows if row["batch"] < 2] == [row for row in kept if row["batch"] < 2]
    assert rows[-1]["batch"] == 4
    first, second = json.loads((run / "run.json").read_text())["starts"]
    assert [first] == json.loads((EARLIER / run / "run.json").read_text())["starts"]
    assert second["data"] == first["data"]


def test_the_records_are_reported(earlier):
    run = write_report(earlier / "runs/tiny").read_text()
    assert "After 2 steps of pruning from tiny-base" in run
    shutil.copy(earlier / "model/pruning.json", earlier / "runs/tiny")
    extracted = write_report(earlier / "runs/tiny", overwrite=True).read_text()
    assert "| total | 9,785 | 4,457 | 45.5% |" in extracted
