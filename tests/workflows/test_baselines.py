"""Baselines on the tiny model: what is kept, how it is judged, what the folder says."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel

from bge_pruning.config.load import ConfigError
from bge_pruning.config.schema import METHODS
from bge_pruning.selection.layer_choice import layer_masks
from bge_pruning.train import train
from bge_pruning.training.builders import build_base_model
from bge_pruning.training.plan import build_plan
from bge_pruning.workflows import baselines
from bge_pruning.workflows.baselines import (
    calibration_texts,
    choose_masks,
    cut_baseline,
    layer_score,
    plan_baseline,
    shape_of,
)

BASELINES = METHODS[1:]
NO_EVAL = "data.eval=[]"


def cut(config, folder: Path) -> dict:
    record = cut_baseline(config, folder)
    content = json.loads((folder / "pruning.json").read_text())
    assert content == record.as_dict()
    return content


@pytest.mark.parametrize("method", BASELINES)
def test_the_cut_model_is_valid_and_has_the_target_shape(method, configure, tmp_path):
    info = cut(configure(f"method={method}"), tmp_path / "cut")  # masked == extracted, or it raises
    assert info["largest_difference"] <= 1e-5
    shape = AutoModel.from_pretrained(tmp_path / "cut").config
    sizes = (shape.hidden_size, shape.num_attention_heads, shape.intermediate_size)
    expected = (32, 4, 64) if method == "layers" else (24, 3, 48)
    assert sizes == expected
    assert shape.num_hidden_layers == (1 if method == "layers" else 3)
    assert info["method"] == method
    assert info["batches"] == {} and info["constraint"] == {}
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "It was not trained after the cut." in card
    assert "What stays was " in card and "learned gates" not in card


def test_what_is_written_is_what_was_chosen(configure, tmp_path):
    config = configure("method=activation")
    info = cut(config, tmp_path / "cut")
    base = build_base_model(config)
    shape = shape_of(config, build_plan(config), base.shape)
    keep = base.backbone.keep_indices(choose_masks(config, base, shape))
    assert info["kept"] == keep.as_dict()


def test_methods_choose_differently_and_random_by_the_seed(configure):
    base = build_base_model(configure())

    def chosen(*overrides):
        config = configure(*overrides)
        shape = shape_of(config, build_plan(config), base.shape)
        return choose_masks(config, base, shape).intermediate

    names = ("magnitude", "activation", "reconstruction", "random")
    masks = [chosen(f"method={name}") for name in names]
    assert not any(torch.equal(*pair) for pair in combinations(masks, 2))
    assert torch.equal(masks[-1], chosen("method=random"))
    assert not torch.equal(masks[-1], chosen("method=random", "seed=4"))


def test_layers_are_judged_by_the_correlation_of_held_out_pairs(configure, tmp_path, sts_csv):
    from sentence_transformers import SentenceTransformer

    config = configure("method=layers")
    score = layer_score(config, build_base_model(config))
    every_nth = configure("method=layers", "baseline.layer_choice=every_nth")
    info = cut(every_nth, tmp_path / "cut")
    assert info["kept"]["layer"] == [3]
    model = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    model.max_seq_length = 16
    rows = [line.split(",") for line in sts_csv.read_text().splitlines()]
    a, b = (model.encode([row[i] for row in rows]) for i in (0, 1))
    expected = spearmanr((a * b).sum(1), [float(row[2]) for row in rows]).statistic
    assert score([3]) == pytest.approx(expected, abs=1e-4)


def test_the_best_subset_has_the_best_score(configure, monkeypatch):
    config = configure("method=layers", "model.l0_module.target_model.n_layers=4")
    base = build_base_model(config)
    scores = {}
    real = layer_score(config, base)

    def score(kept):
        scores[tuple(kept)] = real(kept)
        return scores[tuple(kept)]

    monkeypatch.setattr(baselines, "layer_score", lambda *_: score)
    shape = shape_of(config, build_plan(config), base.shape)
    masks = choose_masks(config, base, shape)
    assert len(scores) == 6 and shape.num_hidden_layers == 2
    assert tuple(masks.layer.nonzero().flatten().tolist()) == max(scores, key=scores.__getitem__)


def test_without_held_out_pairs_layers_are_judged_by_agreement(configure):
    config = configure("method=layers", NO_EVAL)
    base = build_base_model(config)
    score = layer_score(config, base)
    assert score([0, 1, 2, 3]) == pytest.approx(1.0, abs=1e-6)
    assert score([0]) < 0.999
    texts = calibration_texts(config, base, config.baseline.calibration_texts)
    cosines = []
    for text in texts:
        ids = torch.from_numpy(text[None].astype(np.int64))
        ones = torch.ones_like(ids)
        with torch.no_grad():
            vectors = [
                base.heads.outputs(base.backbone(ids, ones, masks), ones)["dense_vecs"]
                for masks in (layer_masks([1, 2], 4), None)
            ]
        cosines.append(float((vectors[0] * vectors[1]).sum()))
    assert score([1, 2]) == pytest.approx(np.mean(cosines), abs=1e-5)


def test_layers_take_a_budget_too(configure, tmp_path):
    budget = ("model.l0_module.target_model=null", "model.l0_module.target_density=0.8")
    config = configure("method=layers", "baseline.layer_choice=every_nth", *budget)
    info = cut(config, tmp_path / "cut")
    assert info["kept"]["layer"] == [0, 2, 3]
    parameters = info["parameters"]
    assert parameters["extracted"]["encoder"] == 0.75 * parameters["source"]["encoder"]


def test_calibration_texts_are_different_texts_of_the_training_data(configure):
    config = configure("method=activation", "baseline.calibration_texts=30")
    base = build_base_model(config)
    texts = calibration_texts(config, base, config.baseline.calibration_texts)
    rows = [tuple(row) for row in texts]
    assert len(rows) == len(set(rows)) == 30
    every = calibration_texts(config, base, 10000)
    assert set(rows) < {tuple(row) for row in every}
    assert len(every) <= 80  # two for each of the forty pairs
    again = calibration_texts(config, base, config.baseline.calibration_texts)
    assert np.array_equal(again.ids, texts.ids)
    other = calibration_texts(configure("seed=9"), base, 30)
    assert not np.array_equal(other.ids, texts.ids)


# What is refused


L0 = "model.l0_module"
BUDGET = f"{L0}.target_model=null && {L0}.target_density=0.8"
SPEEDUP = f"{L0}.target_model=null && {L0}.target_speedup=2"
SMALL = f"{L0}.target_model={{d_model: 8, n_heads: 1, n_layers: 1}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("seed=3", r"method 'l0' with a target is no baseline\. To fix"),
        (f"method=random && {L0}=null", r"method 'random' with no target is no baseline"),
        (f"method=random && {BUDGET}", r"method 'random' needs a target shape.* To fix, set"),
        # Whole layers are counted in parameters, not in operations.
        (f"method=layers && {SPEEDUP}", r"method 'layers' needs a target shape.* To fix, set"),
        (f"method=layers && {SMALL}", r"method 'layers': a target of .* whole layer"),
    ],
)
def test_what_is_no_baseline(overrides, message, configure):
    with pytest.raises(ConfigError, match=message):
        plan_baseline(configure(*overrides.split(" && ")))


def test_a_baseline_is_not_trained_as_gates_are(configure):
    with pytest.raises(ConfigError, match=r"'random' trains no gates\. To fix, run scripts/run_p"):
        train(configure("method=random"))
