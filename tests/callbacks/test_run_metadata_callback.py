"""What a checkpoint carries besides weights."""

import runpy
from dataclasses import replace

import pytest
import torch
from composer.core import State
from composer.devices import DeviceCPU

from bge_pruning.callbacks import run_metadata_callback
from bge_pruning.callbacks.run_metadata_callback import RunMetadataCallback
from bge_pruning.model_io import checkpoint
from bge_pruning.model_io.checkpoint import RunMetadata

METADATA = RunMetadata(
    base_model="someone/模型",
    shape={"hidden_size": 32},
    hf_config={"model_type": "xlm-roberta", "layer_norm_eps": 1e-05},
    pooling="mean",
    max_seq_length=128,
    seed=3,
    l0_module={"axes": ["head"], "target": None, "start_sparsity": 0.0},
    source_pruning=None,
    versions={"torch": "2.7.0"},
    tokenizer_files={"tokenizer.json": b'{"a": 1}', "any.bytes": bytes(range(256))},
)


def test_metadata_comes_back_and_a_resumed_run_keeps_its_own(tmp_path):
    model = torch.nn.Linear(1, 1)
    callbacks = [RunMetadataCallback(METADATA)]
    state = State(model, 0, "run", DeviceCPU(), callbacks=callbacks)
    state.optimizers = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.save(state.state_dict()["callbacks"], tmp_path / "callbacks.pt")
    stored = dict(torch.load(tmp_path / "callbacks.pt", weights_only=True))
    assert RunMetadata.from_state_dict(stored["RunMetadataCallback"]) == METADATA
    own = replace(METADATA, seed=4, tokenizer_files={})
    callback = RunMetadataCallback(own)
    callback.load_state_dict(RunMetadataCallback(METADATA).state_dict())
    assert RunMetadata.from_state_dict(callback.state_dict()) == own


@pytest.mark.parametrize("now", [None, {"kept": {"layer": [0, 2]}}])
def test_the_checkpoint_of_an_earlier_cut_is_not_resumed(now):
    """Its units are others, and the run would end with the weights of the earlier model."""
    earlier = replace(METADATA, source_pruning={"kept": {"layer": [0, 1]}})
    stored = RunMetadataCallback(earlier).state_dict()
    RunMetadataCallback(earlier).load_state_dict(stored)
    callback = RunMetadataCallback(replace(METADATA, source_pruning=now))
    with pytest.raises(ValueError, match=r"before it was cut anew\. To fix, remove the run folder"):
        callback.load_state_dict(stored)


def test_a_renamed_key_is_noticed_at_once(monkeypatch):
    monkeypatch.setattr(checkpoint, "METADATA_KEY", "Metadata")
    with pytest.raises(RuntimeError, match="checkpoints look for Metadata; rename one of the two"):
        runpy.run_path(run_metadata_callback.__file__)
