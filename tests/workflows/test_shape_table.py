"""What a search for a shape says: on the tiny model, in a table, in words and in a file."""

import json

import pytest

from bge_pruning.config.load import load_config
from bge_pruning.models import encoder_shape
from bge_pruning.models.encoder_shape import count_parameters, forward_flops
from bge_pruning.models.shape_choice import shapes_of_budget
from bge_pruning.workflows.shape_search import render_spans, search_rows, search_shapes, summarise
from tests.common.script_process import load_script

HALF = "model.l0_module={target_model: null, target_density: 0.5, target_length: 256}"
CHANGES = [HALF, "baseline.calibration_texts=40"]


@pytest.fixture
def search(tiny_yaml, monkeypatch):
    # The tiny model's units are too few for multiples of 8 to be near a budget.
    monkeypatch.setattr(encoder_shape, "FINEST_UNITS", 1)
    shapes_of_budget.cache_clear()
    yield search_half(tiny_yaml)
    shapes_of_budget.cache_clear()


def search_half(tiny_yaml):
    return search_shapes(load_config([tiny_yaml], CHANGES), every=True)


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
        share = count_parameters(s).encoder / count_parameters(search.source).encoder
        assert row["encoder"] == f"{share:.1%}"
        faster = forward_flops(search.source, [256]) / forward_flops(s, [256])
        assert float(row["speed-up at 256"]) == pytest.approx(faster, abs=0.005)
        assert float(row["error of cosines"]) == pytest.approx(m.cosine_error, abs=1e-4)
        assert float(row["of multi-vectors"]) == pytest.approx(m.multi_vector_error, abs=1e-4)
    assert rows[0][header.index("above the best")] == ""
    low, high = map(float, rows[1][header.index("above the best")].split(" to "))
    assert (low, high) == pytest.approx(search.measured[1].above_best, abs=1e-4)


def test_ties_with_the_best_are_said(search):
    ties = [m for m in search.measured[1:] if m.above_best[0] <= 0]
    text = summarise(search)
    told = f"{len(ties)} of the others may be as good" if ties else "the others are worse"
    assert told in text and search.override in text
    assert f"judged on {search.judged_texts} others; none was trained" in text


def test_the_script_prints_a_table_and_writes_it(tiny_yaml, tmp_path, capsys):
    output = tmp_path / "new" / "shapes.json"
    arguments = [str(tiny_yaml), "--output", str(output), *CHANGES]
    assert load_script("choose_shape").main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert f"{len(found['measured'])} of {found['candidates']} shapes measured" in printed
    assert f"{found['measured'][0]['cosine_error']:.4f}" in printed
    before = output.read_bytes()
    assert load_script("choose_shape").main(arguments) == 1
    assert output.read_bytes() == before
