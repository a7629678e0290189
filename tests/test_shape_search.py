"""Shapes of a size, measured on the tiny model: what is tried, what is measured, what is said."""

import copy
import json
import logging
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from bge_pruning import shape_search
from bge_pruning.builders import build_base_model
from bge_pruning.calibration import calibration_texts, measure_importance, pad_batches
from bge_pruning.config import ConfigError, load_config
from bge_pruning.models import encoder_shape
from bge_pruning.models.encoder_shape import count_parameters, forward_flops
from bge_pruning.models.extraction import cut
from bge_pruning.models.importance import masks_of_importance
from bge_pruning.models.reconstruction import refit_
from bge_pruning.models.shape_choice import shapes_of_budget
from bge_pruning.plan import build_plan
from bge_pruning.shape_search import (
    cosine_error,
    find_candidates,
    render_spans,
    search_rows,
    search_shapes,
    summarise,
)
from tests.script_process import load_script

HALF = "model.l0_module={target_model: null, target_density: 0.5}"
TEXTS = "baseline.calibration_texts=40"


@pytest.fixture(autouse=True)
def units_one_by_one(monkeypatch):
    """The tiny model's units are too few for multiples of 8 to be near a budget."""
    monkeypatch.setattr(encoder_shape, "FINEST", 1)
    shapes_of_budget.cache_clear()
    yield
    shapes_of_budget.cache_clear()


@pytest.fixture
def configure(tiny_yaml):
    return lambda *overrides: load_config([tiny_yaml], overrides)


@pytest.fixture
def half(configure):
    return configure(HALF, TEXTS)


def sizes(shapes) -> list[tuple[int, int, int]]:
    return [(s.num_hidden_layers, s.num_attention_heads, s.intermediate_size) for s in shapes]


def candidates(config):
    base = build_base_model(config)
    return find_candidates(config, build_plan(config), base.shape), base.shape


def test_candidates_meet_the_budget_and_have_the_heads_of_the_model(half):
    shapes, source = candidates(half)
    assert len(shapes) > 2
    for shape in shapes:
        assert count_parameters(shape).encoder == pytest.approx(
            count_parameters(source).encoder / 2, rel=0.005
        )
        assert (shape.colbert_dim, shape.sparse_head, shape.pooler) == (32, True, True)


def test_a_speedup_is_a_budget_of_operations(configure):
    speedup = "model.l0_module={target_model: null, target_speedup: 2.0, target_length: 16}"
    shapes, source = candidates(configure(speedup))
    for shape in shapes:
        fewer = forward_flops(source, [16]) / forward_flops(shape, [16])
        assert fewer == pytest.approx(2.0, rel=0.006)


def test_a_target_shape_is_among_the_shapes_of_its_size(configure):
    target = (
        "model.l0_module.target_model={d_model: 32, n_heads: 4, n_layers: 3, intermediate_size: 37}"
    )
    shapes, source = candidates(configure(target))
    assert (3, 4, 37) in sizes(shapes)
    assert len(set(sizes(shapes))) == len(shapes) > 1
    wanted = replace(source, num_hidden_layers=3, intermediate_size=37)
    for shape in shapes:
        assert count_parameters(shape).encoder == pytest.approx(
            count_parameters(wanted).encoder, rel=0.005
        )


def test_axes_without_gates_keep_their_size(configure):
    axes = "model.l0_module.pruning_modules=[layer, intermediate]"
    shapes, _ = candidates(configure(HALF, axes))
    assert len(shapes) > 1
    assert {s.num_attention_heads for s in shapes} == {4}


def test_an_error_is_that_of_the_cut_and_fitted_model_on_other_texts(half):
    search = search_shapes(half, every=True)
    assert search.fitted_texts + search.judged_texts == len(texts_of(half))
    assert sorted(sizes(m.shape for m in search.measured)) == sorted(sizes(candidates(half)[0]))
    chosen = search.measured[0]
    found, wanted, multi = outputs_by_hand(half, chosen.shape, search.fitted_texts)
    assert chosen.cosine_error == pytest.approx(1 - pearsonr(found, wanted).statistic, abs=1e-5)
    assert chosen.multi_vector_error == pytest.approx(1 - multi, abs=1e-5)
    _, _, unfitted = outputs_by_hand(half, chosen.shape, search.fitted_texts, fit=False)
    assert multi > unfitted + 0.01


def texts_of(config):
    base = build_base_model(config)
    wanted = config.baseline.calibration_texts + shape_search.JUDGED_TEXTS
    return calibration_texts(config, base, wanted)


def outputs_by_hand(config, shape, fitted, fit=True):
    """Cosines of pairs of the texts to judge by, cut and whole, and the mean of multi-vectors."""
    base = build_base_model(config)
    texts = texts_of(config)
    masks = masks_of_importance(measure_importance("reconstruction", config, base), shape)
    keep = base.backbone.keep_indices(masks)
    whole, heads = base.backbone.eval(), base.heads.eval()
    small, small_heads = copy.deepcopy(whole), copy.deepcopy(heads)
    cut(small, small_heads, keep)
    batches = list(pad_batches(texts, range(fitted), config, base, "cpu"))
    if fit:
        refit_(small, whole, keep.layer, keep.hidden, batches)
    vectors, multi = ([], []), []
    with torch.no_grad():
        for index in range(fitted, len(texts)):
            ids = torch.from_numpy(texts[index].astype(np.int64))[None]
            tokens = []
            for k, (backbone, head) in enumerate([(small, small_heads), (whole, heads)]):
                states = backbone(ids, torch.ones_like(ids))[0]
                vectors[k].append(states[0] / states[0].norm())
                tokens.append(head.colbert_linear(states[1:]))
            multi += torch.cosine_similarity(*tokens, dim=-1).tolist()
    cosines = [[float(a @ b) for a, b in combinations(part, 2)] for part in vectors]
    return *cosines, float(np.mean(multi))


def test_the_whole_model_has_no_error(configure):
    whole = configure("model.l0_module={target_model: null, target_density: 1.0}", TEXTS)
    (only,) = search_shapes(whole).measured
    assert only.layers == (0, 1, 2, 3)
    assert only.cosine_error < 1e-4 and only.multi_vector_error < 1e-4


def test_the_best_comes_first_and_all_depths_of_the_full_width_are_tried(half, caplog):
    caplog.set_level(logging.INFO)
    search = search_shapes(half)
    errors = [m.cosine_error for m in search.measured]
    assert errors == sorted(errors)
    full = {s for s in candidates(half)[0] if s.num_attention_heads == 4}
    assert full <= {m.shape for m in search.measured}
    assert sum("error of cosines" in message for message in caplog.messages) == len(errors)


def test_the_search_leaves_training_and_gradients_as_they_are(half, monkeypatch):
    base = build_base_model(half)
    before = copy.deepcopy(base.backbone.state_dict())
    monkeypatch.setattr(shape_search, "build_base_model", lambda config: base)
    search_shapes(half)
    for name, value in base.backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_with_few_texts_a_third_is_judged_on(configure):
    search = search_shapes(configure(HALF, "baseline.calibration_texts=500"))
    assert search.judged_texts == len(texts_of(configure(HALF))) // 3
    assert search.fitted_texts >= 2 * search.judged_texts - 1


def test_no_texts_to_fit_to_is_an_error(half, monkeypatch):
    whole = shape_search.calibration_texts
    monkeypatch.setattr(
        shape_search, "calibration_texts", lambda config, base, count: whole(config, base, 2)
    )
    with pytest.raises(ValueError, match=r"^the training data have 2 texts, too few to fit and"):
        search_shapes(half)


def test_no_target_is_an_error(configure):
    with pytest.raises(ConfigError, match=r"^model\.l0_module is null: there is no size"):
        search_shapes(configure("model.l0_module=null"))


def test_the_error_of_cosines_is_of_their_order_not_of_their_size():
    wanted = np.array([0.1, 0.5, 0.9, 0.2])
    assert cosine_error(0.5 * wanted + 0.3, wanted) == pytest.approx(0.0)
    assert cosine_error(-wanted, wanted) == pytest.approx(2.0)
    assert cosine_error(np.full(4, 0.7), wanted) == 1.0


@pytest.mark.parametrize(
    ("layers", "text"),
    [((0, 2, 3, 4, 5), "0, 2-5"), ((1,), "1"), ((0, 1), "0-1"), ((0, 2, 4), "0, 2, 4")],
)
def test_layers_are_written_as_runs(layers, text):
    assert render_spans(layers) == text


@pytest.mark.parametrize(
    "target",
    [
        "model.l0_module={target_model: null, target_density: 0.5}",
        "model.l0_module={target_model: null, target_parameters: 15e3}",
        "model.l0_module={target_model: null, target_speedup: 2}",
        "model.l0_module.target_model={d_model: 24, n_heads: 3, n_layers: 2}",
    ],
)
def test_the_override_that_is_printed_sets_the_best_shape(target, configure):
    search = search_shapes(configure(target, TEXTS))
    printed = summarise(search).rsplit("The best of them: ", 1)[1].strip('"')
    found = build_plan(configure(target, printed)).target
    assert sizes([found]) == sizes([search.measured[0].shape])


def test_rows_say_what_each_shape_costs(half):
    search = search_shapes(half)
    header, rows = search_rows(search)
    best = search.measured[0]
    row = dict(zip(header, rows[0], strict=True))
    assert [int(row[k]) for k in ("layers", "heads", "units")] == list(sizes([best.shape])[0])
    assert row["encoder"] == "50.0%" or abs(float(row["encoder"][:-1]) - 50) < 0.3
    source = search.plan.source
    assert float(row["speed-up at 128"]) == pytest.approx(
        forward_flops(source, [128]) / forward_flops(best.shape, [128]), abs=0.005
    )


def test_the_script_prints_a_table_and_writes_it(tiny_yaml, tmp_path, capsys):
    output = tmp_path / "shapes.json"
    arguments = [str(tiny_yaml), HALF, TEXTS, "--output", str(output)]
    assert load_script("choose_shape").main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert f"{len(found['measured'])} of {found['candidates']} shapes measured" in printed
    assert f"{found['measured'][0]['cosine_error']:.4f}" in printed
    before = output.read_bytes()
    assert load_script("choose_shape").main(arguments) != 0
    assert output.read_bytes() == before
