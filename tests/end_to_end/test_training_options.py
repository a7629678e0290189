"""Options that trade time for memory change what is kept and computed, not what is learned."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from tests.common.trainings import extract_json, losses

STEPS = ("max_duration=4ba", "optimizer.eps=1e-4")


def tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: value for n, value in state.items() if "_embeddings.weight" in n}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, train_tiny) -> Path:
    return train_tiny(tmp_path_factory.mktemp("plain"), *STEPS)


def test_activation_checkpointing_is_the_same_run(tmp_path, train_tiny, plain, load_state):
    run = train_tiny(tmp_path, *STEPS, "model.activation_checkpointing=true")
    assert losses(run) == losses(plain)
    for name, value in load_state(run)["model"].items():
        assert torch.equal(value, load_state(plain)["model"][name]), name


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_a_compiled_encoder_learns_the_same(tmp_path, train_tiny, plain, monkeypatch):
    compile_encoder = XLMRobertaBackbone.compile_encoder

    def compile_quickly(self: XLMRobertaBackbone, training: bool) -> None:
        compile_encoder(self, training, "aot_eager")

    monkeypatch.setattr(XLMRobertaBackbone, "compile_encoder", compile_quickly)
    torch._dynamo.reset()
    run = train_tiny(tmp_path, *STEPS, "model.compile=true")
    assert losses(run) == pytest.approx(losses(plain), abs=1e-5)
    assert extract_json(run, tmp_path / "small")["largest_difference"] <= 1e-5


def test_frozen_embeddings_stay_and_have_no_moments(tmp_path, train_tiny, load_state, plain):
    run = train_tiny(tmp_path, *STEPS, "model.freeze_embeddings=true")
    state, source = load_state(run), load_state(plain)
    base = tables(load_base_model(base_model_of(run)).backbone.state_dict())
    found = {n.removeprefix("backbone."): v for n, v in tables(state["model"]).items()}
    assert found.keys() == base.keys() and len(base) == 3
    for name, value in found.items():
        assert torch.equal(value, base[name]), name
    changed = tables(source["model"])
    assert not any(torch.equal(v, base[n.removeprefix("backbone.")]) for n, v in changed.items())
    moments = state["optimizers"]["AdamW"]["state"]
    assert len(moments) == len(source["optimizers"]["AdamW"]["state"]) - 3
    weights = "encoder.layer.0.intermediate.dense.weight"
    trained, before = state["model"][f"backbone.{weights}"], load_base_model(base_model_of(run))
    assert not torch.equal(trained, before.backbone.state_dict()[weights])
    assert extract_json(run, tmp_path / "small")["largest_difference"] <= 1e-5


def base_model_of(run: Path) -> str:
    from bge_pruning.config.load import load_config

    return load_config([run / "config.yaml"]).model.base_model
