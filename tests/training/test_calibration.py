"""Refitting before a recovery, and gates that start in an order of importance."""

import copy
import logging
from dataclasses import replace

import pytest
import torch

from bge_pruning.config.load import ConfigError, pruned_model_folder
from bge_pruning.model_io.checkpoint import find_checkpoint, load_trained_model
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.training import calibration
from bge_pruning.training.builders import build_base_model
from bge_pruning.training.calibration import measure_importance, order_gates, refit
from bge_pruning.workflows.baselines import cut_baseline

REFIT = ("teacher.refit_texts=60", "stage=recover", "method=activation")


@pytest.fixture
def recovery(configure):
    """A recovery of a model that is cut and lies where it is looked for."""
    config = configure("method=activation")
    cut_baseline(config, pruned_model_folder(config))
    return lambda *overrides: configure(*REFIT, *overrides)


def agreement(config, base) -> float:
    """Mean cosine of some training texts' vectors with those of the uncut model."""
    teacher = load_base_model(base.pruning.source.base_model)
    kept = base.pruning.kept.hidden
    cosines = []
    with torch.no_grad():
        for ids, mask in calibration.calibration_batches(config, base, 60, "cpu"):
            mine = base.backbone(ids, mask)[:, 0]
            full = teacher.backbone(ids, mask)[:, 0, kept]
            cosines.append(torch.cosine_similarity(mine, full))
    return float(torch.cat(cosines).mean())


def test_a_recovery_starts_from_the_refitted_model(recovery, caplog, train_tiny, tmp_path):
    caplog.set_level(logging.INFO)
    overrides = ("max_duration=1ba", "optimizer.lr=0", "precision=fp32")
    config = recovery(*overrides)
    trained = load_trained_model(find_checkpoint(train_tiny(tmp_path, *REFIT, *overrides)))
    assert sum(message.startswith("fitted to") for message in caplog.messages) == 1
    assert any("weights fitted to the uncut model on 60 texts" in m for m in caplog.messages)
    assert trained.metadata.refit_texts == 60
    base = build_base_model(config)
    training, before = base.backbone.training, agreement(config, base)
    refit(config, base)
    assert agreement(config, base) > before + 0.01  # it is nearer to its source
    assert base.backbone.training == training
    for name, value in trained.backbone.state_dict().items():
        assert torch.equal(value, base.backbone.state_dict()[name])


def test_a_chosen_pooling_is_that_of_the_uncut_model_too(recovery, monkeypatch):
    """What the outputs feel of a token is asked of the model that the student was."""
    config, asked = recovery("model.pooling=mean"), []
    base = build_base_model(config)
    measure = calibration.weigh_tokens
    monkeypatch.setattr(calibration, "weigh_tokens", lambda *a: asked.append(a[1]) or measure(*a))
    refit(config, base)
    assert [heads.pooling for heads in asked] == [base.heads.pooling] == ["mean"]


def test_a_run_that_goes_on_is_not_fitted_again(recovery, caplog, train_tiny, tmp_path):
    caplog.set_level(logging.INFO)
    train_tiny(tmp_path, *REFIT, "max_duration=2ba", "save_interval=1ba")
    caplog.clear()
    train_tiny(tmp_path, *REFIT, "max_duration=3ba", "save_interval=1ba", "autoresume=true")
    assert not any(message.startswith("fitted to") for message in caplog.messages)


def test_only_an_extracted_model_can_be_fitted(configure):
    config = configure("teacher.refit_texts=10")
    with pytest.raises(ConfigError, match=r"has no pruning\.json. To fix, set teacher\.refit_t"):
        refit(config, build_base_model(config))


def test_a_model_with_other_tokens_is_refused(recovery):
    config = recovery()
    base = build_base_model(config)
    tokenizer = base.tokenizer_files["tokenizer.json"].replace(b'"three"', b'"other"')
    assert tokenizer != base.tokenizer_files["tokenizer.json"]
    files = {**base.tokenizer_files, "tokenizer.json": tokenizer}
    with pytest.raises(ConfigError, match="has other tokens than .* To fix, set teacher.refit"):
        refit(config, replace(base, tokenizer_files=files))


@pytest.mark.parametrize("order", ["activation", "reconstruction"])
def test_gates_start_in_the_order_of_importance(order, configure):
    config = configure(f"model.l0_module.init_order={order}")
    base = build_base_model(config)
    axes = ("head", "hidden", "intermediate", "layer")
    target = replace(
        base.shape, hidden_size=24, num_attention_heads=3, num_hidden_layers=3, intermediate_size=48
    )
    gates = L0Module(base.shape, axes, target, seed=1).log_alpha
    drawn = copy.deepcopy(gates)
    order_gates(config, base, gates)
    importance = measure_importance(order, config, base)
    for axis in axes:
        assert torch.equal(gates[axis].sort(-1).values, drawn[axis].sort(-1).values)
        scores = getattr(importance, axis)
        assert torch.equal(gates[axis].argsort(dim=-1), scores.argsort(dim=-1, stable=True))


def test_a_run_starts_with_these_gates(configure, train_tiny, tmp_path):
    overrides = ["model.l0_module.init_order=activation", "max_duration=1ba", "optimizer.l0_lr=0"]
    config = configure(*overrides)
    run = train_tiny(tmp_path, *overrides)
    gates = load_trained_model(find_checkpoint(run)).l0_module.log_alpha
    importance = measure_importance("activation", config, build_base_model(config))
    for axis, log_alpha in gates.items():
        scores = getattr(importance, axis)
        assert torch.equal(log_alpha.argsort(dim=-1), scores.argsort(dim=-1, stable=True))
