"""Shapes of a size on the tiny model: what is tried and measured, in a table, words and a file."""

import copy
import json
import logging
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from bge_pruning.config.load import ConfigError, load_config
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.model_io.checkpoint import cut
from bge_pruning.models import shape_choice
from bge_pruning.models.encoder_shape import count_parameters, forward_flops
from bge_pruning.models.shape_choice import shapes_of_budget
from bge_pruning.selection.importance import masks_of_importance
from bge_pruning.selection.reconstruction import refit_
from bge_pruning.selection.reconstruction_importance import reconstruction_importance
from bge_pruning.selection.sensitivity import weigh_tokens
from bge_pruning.training.builders import build_base_model
from bge_pruning.training.calibration import calibration_texts, pad_batches
from bge_pruning.training.plan import build_plan
from bge_pruning.workflows import shape_search
from bge_pruning.workflows.shape_search import (
    find_candidates,
    render_spans,
    search_rows,
    search_shapes,
    split_texts,
    summarise,
)
from tests.common.script_process import load_script

HALF = "model.l0_module={target_model: null, target_density: 0.5, target_length: 256}"
TEXTS = "baseline.calibration_texts=40"


@pytest.fixture(autouse=True, scope="module")
def units_one_by_one():
    """The tiny model's units are too few for multiples of 8 to be near a budget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape_choice, "FINEST_UNITS", 1)
        shapes_of_budget.cache_clear()
        yield
    shapes_of_budget.cache_clear()


@pytest.fixture(scope="module")
def half(make_yaml, tmp_path_factory):
    return load_config([make_yaml(tmp_path_factory.mktemp("half"))], [HALF, TEXTS])


@pytest.fixture(scope="module")
def search(half):
    """All shapes of half the size."""
    return search_shapes(half, every=True)


def sizes(shapes) -> list[tuple[int, int, int]]:
    return [(s.num_hidden_layers, s.num_attention_heads, s.intermediate_size) for s in shapes]


def candidates(config):
    base = build_base_model(config)
    return find_candidates(config, build_plan(config), base.shape), base.shape


def encoder(shape) -> int:
    return count_parameters(shape).encoder


def test_candidates_meet_the_budget_and_have_the_heads_of_the_model(half):
    shapes, source = candidates(half)
    assert len(shapes) > 2
    for shape in shapes:
        assert encoder(shape) == pytest.approx(encoder(source) / 2, rel=0.005)
        assert (shape.colbert_dim, shape.sparse_head, shape.pooler) == (32, True, True)


def test_a_speedup_is_a_budget_of_operations(configure):
    speedup = "model.l0_module={target_model: null, target_speedup: 2.0, target_length: 16}"
    shapes, source = candidates(configure(speedup))
    for shape in shapes:
        fewer = forward_flops(source, [16]) / forward_flops(shape, [16])
        assert fewer == pytest.approx(2.0, rel=0.006)


def test_a_target_shape_is_among_the_shapes_of_its_size(configure):
    target = "{d_model: 32, n_heads: 4, n_layers: 3, intermediate_size: 37}"
    shapes, source = candidates(configure(f"model.l0_module.target_model={target}"))
    assert (3, 4, 37) in sizes(shapes)
    assert len(set(sizes(shapes))) == len(shapes) > 1
    wanted = replace(source, num_hidden_layers=3, intermediate_size=37)
    for shape in shapes:
        assert encoder(shape) == pytest.approx(encoder(wanted), rel=0.005)


def test_axes_without_gates_keep_their_size(configure):
    axes = "model.l0_module.pruning_modules=[layer, intermediate]"
    shapes, _ = candidates(configure(HALF, axes))
    assert len(shapes) > 1
    assert {s.num_attention_heads for s in shapes} == {4}


@pytest.mark.parametrize("place", [0, -1])
def test_an_error_is_that_of_the_cut_and_fitted_model_on_other_texts(half, search, place):
    assert sorted(sizes(m.shape for m in search.measured)) == sorted(sizes(candidates(half)[0]))
    wanted = half.baseline.calibration_texts
    texts = calibration_texts(half, build_base_model(half), wanted + shape_search.JUDGED_TEXTS)
    fitted, judged = split_texts(texts, wanted)
    assert (search.fitted_texts, search.judged_texts) == (len(fitted), len(judged))
    chosen = search.measured[place]
    found, wanted, multi = outputs_by_hand(half, chosen.shape, texts, fitted, judged)
    assert chosen.cosine_error == pytest.approx(1 - pearsonr(found, wanted).statistic, abs=1e-5)
    assert chosen.multi_vector_error == pytest.approx(1 - multi, abs=1e-5)
    *_, unfitted = outputs_by_hand(half, chosen.shape, texts, fitted, judged, fit=False)
    assert multi > unfitted + 0.01


def outputs_by_hand(config, shape, texts, fitted, judged, fit=True):
    """Cosines of pairs of the texts to judge on, cut and whole, and the mean of multi-vectors."""
    base = build_base_model(config)
    whole, heads = base.backbone.eval(), base.heads.eval()
    batches = list(pad_batches(texts, fitted, config, base, "cpu"))
    importance = reconstruction_importance(whole, heads, batches, config.seed)
    keep = whole.keep_indices(masks_of_importance(importance, shape))
    small, small_heads = copy.deepcopy(whole), copy.deepcopy(heads)
    cut(small, small_heads, keep)
    if fit:
        weighed = weigh_tokens(whole, heads, batches, config.seed)
        refit_(small, whole, keep.layer, keep.hidden, weighed)
    vectors, multi = ([], []), []
    with torch.no_grad():
        for index in judged:
            ids = torch.from_numpy(texts[index].astype(np.int64))[None]
            tokens = []
            for k, (backbone, head) in enumerate([(small, small_heads), (whole, heads)]):
                states = backbone(ids, torch.ones_like(ids))[0]
                vectors[k].append(states[0] / states[0].norm())
                tokens.append(head.colbert_linear(states[1:]))
            multi += torch.cosine_similarity(*tokens, dim=-1).tolist()
    cosines = [[float(a @ b) for a, b in combinations(part, 2)] for part in vectors]
    return *cosines, float(np.mean(multi))


def test_nearly_the_whole_model_has_nearly_no_error(configure):
    """A unit less in each layer."""
    target = "{d_model: 32, n_heads: 4, n_layers: 4, intermediate_size: 63}"
    changes = (f"model.l0_module.target_model={target}", TEXTS)
    axes = "model.l0_module.pruning_modules=[intermediate]"
    (only,) = search_shapes(configure(*changes, axes)).measured
    assert only.layers == (0, 1, 2, 3) and only.above_best == (0.0, 0.0)
    assert only.cosine_error < 0.05 and only.multi_vector_error < 0.05


def test_the_best_comes_first_and_all_depths_of_the_full_width_are_tried(half, caplog):
    caplog.set_level(logging.INFO)
    search = search_shapes(half)
    errors = [m.cosine_error for m in search.measured]
    assert errors == sorted(errors)
    full = {s for s in candidates(half)[0] if s.num_attention_heads == 4}
    assert full <= {m.shape for m in search.measured}
    assert sum("error of cosines" in message for message in caplog.messages) == len(errors)


def test_the_search_leaves_the_weights_as_they_are(configure, monkeypatch):
    """Also those of the embeddings, which the cut models share until they are cut themselves."""
    config = configure(TEXTS)  # a target with fewer dimensions
    base = build_base_model(config)
    before = copy.deepcopy({**base.backbone.state_dict(), **base.heads.state_dict()})
    monkeypatch.setattr(shape_search, "build_base_model", lambda config: base)
    found = search_shapes(config, every=True).measured
    assert min(m.shape.hidden_size for m in found) < 32
    for name, value in {**base.backbone.state_dict(), **base.heads.state_dict()}.items():
        assert torch.equal(value, before[name])


def test_others_are_compared_with_the_best(search):
    best, *others = search.measured
    assert best.above_best == (0.0, 0.0) and others
    for other in others:
        low, high = other.above_best
        assert low < other.cosine_error - best.cosine_error < high
    ties = [other for other in others if other.above_best[0] <= 0]
    text = summarise(search)
    told = f"{len(ties)} of the others may be as good" if ties else "the others are worse"
    assert told in text and search.override in text
    assert f"judged on {search.judged_texts} others; none was trained" in text


def tokenized(*texts) -> TokenizedTexts:
    starts = np.cumsum([0, *map(len, texts)])
    return TokenizedTexts(np.concatenate(texts).astype(np.int32), starts, truncated=0)


def test_texts_are_fitted_to_or_judged_on_and_counted_once():
    texts = tokenized(*([i, i + 1] for i in (*range(100), *range(50), *range(100, 300))))
    fitted, judged = split_texts(texts, 40)
    assert (len(fitted), len(judged)) == (40, 256)
    chosen = [tuple(texts[i]) for i in (*fitted, *judged)]
    assert len(set(chosen)) == 296
    for few in (1, 47):
        message = rf"^the training data have {few} different texts, too few .*: 48 are needed\."
        with pytest.raises(ValueError, match=message):
            split_texts(tokenized(*([i, 7] for i in range(few))), 512)


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(768, 512, (512, 256)), (600, 512, (400, 200)), (60, 512, (40, 20)), (288, 32, (32, 256))],
)
def test_with_few_texts_a_third_is_judged_on(count, wanted, expected):
    fitted, judged = split_texts(tokenized(*([i, 7] for i in range(count))), wanted)
    assert (len(fitted), len(judged)) == expected


def test_a_model_that_tells_no_texts_apart_is_an_error(half, monkeypatch):
    monkeypatch.setattr(shape_search, "_cosines", lambda outputs: np.full((20, 20), 0.9))
    monkeypatch.setattr(shape_search, "split_texts", lambda *_: (range(20), range(20, 40)))
    with pytest.raises(ValueError, match=r"gives all pairs of texts the same cosine"):
        search_shapes(half)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage=recover", r"^stage is recover, whose model is cut already"),
        ("data.train=[]", r"^data\.train is empty"),
        ("model.l0_module=null", r"^model\.l0_module is null: there is no size"),
        (HALF.replace("0.5", "1.0"), r"^only the model as it is meets the target"),
    ],
)
def test_what_cannot_be_searched_is_refused(change, message, configure):
    with pytest.raises(ConfigError, match=message):
        search_shapes(configure(change))


@pytest.mark.parametrize(
    "target",
    [
        HALF,
        "model.l0_module={target_model: null, target_parameters: 15e3}",
        "model.l0_module={target_model: null, target_speedup: 2}",
        "model.l0_module.target_model={d_model: 24, n_heads: 3, n_layers: 2}",
    ],
)
def test_the_override_sets_the_best_shape(target, configure):
    search = search_shapes(configure(target, TEXTS))
    found = build_plan(configure(target, search.override)).target
    best = search.measured[0].shape
    assert (sizes([found]), found.hidden_size) == (sizes([best]), best.hidden_size)


@pytest.mark.parametrize(
    ("layers", "text"),
    [((0, 2, 3, 4, 5), "0, 2-5"), ((1,), "1"), ((0, 1), "0-1"), ((0, 2, 4), "0, 2, 4")],
)
def test_layers_are_written_as_runs(layers, text):
    assert render_spans(layers) == text


def test_rows_say_what_each_shape_costs_and_loses(search):
    header, rows = search_rows(search)
    assert len(rows) == len(search.measured) > 1
    for cells, m in zip(rows, search.measured, strict=True):
        row = dict(zip(header, cells, strict=True))
        s = m.shape
        sizes = (s.num_hidden_layers, s.hidden_size, s.num_attention_heads, s.intermediate_size)
        assert [int(row[k]) for k in ("layers", "hidden", "heads", "units")] == list(sizes)
        assert row["encoder"] == f"{encoder(s) / encoder(search.source):.1%}"
        faster = forward_flops(search.source, [256]) / forward_flops(s, [256])
        assert float(row["speed-up at 256"]) == pytest.approx(faster, abs=0.005)
        assert float(row["error of cosines"]) == pytest.approx(m.cosine_error, abs=1e-4)
        assert float(row["of multi-vectors"]) == pytest.approx(m.multi_vector_error, abs=1e-4)
    assert rows[0][header.index("above the best")] == ""
    low, high = map(float, rows[1][header.index("above the best")].split(" to "))
    assert (low, high) == pytest.approx(search.measured[1].above_best, abs=1e-4)


def test_the_script_prints_a_table_and_writes_what_it_is_of(
    tiny_yaml, tmp_path, capsys, model_folder
):
    output = tmp_path / "new" / "shapes.json"
    target = "model.l0_module={target_model: null, target_speedup: 2}"
    arguments = [str(tiny_yaml), "--output", str(output), target, TEXTS]
    assert load_script("choose_shape").main(arguments) == 0
    printed, before = capsys.readouterr().out, output.read_bytes()
    found = json.loads(before)
    assert f"{len(found['measured'])} of {found['candidates']} shapes measured" in printed
    assert f"{found['measured'][0]['cosine_error']:.4f}" in printed
    assert (found["base_model"], found["revision"]) == (str(model_folder), None)
    assert (found["target_speedup"], found["target_length"], found["target"]) == (2, 128, None)
    assert found["source"]["num_hidden_layers"] == 4
    assert found["train"] == ["train"] and "torch" in found["versions"]
    assert found["override"] in printed
    assert load_script("choose_shape").main(arguments) == 1
    assert output.read_bytes() == before
