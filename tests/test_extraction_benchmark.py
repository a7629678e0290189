"""The benchmark's arithmetic and words; it runs as a whole in test_scripts."""

import json
import os

import pytest

from bge_pruning.config import ConfigError, load_config
from bge_pruning.export.extraction_cost import ExtractionCost
from bge_pruning.extraction_benchmark import (
    Copying,
    ExtractionBenchmark,
    measure,
    measure_copying,
    render,
)


@pytest.fixture
def found() -> ExtractionBenchmark:
    gb = 10**9
    return ExtractionBenchmark(
        shapes=("24 layers", "20 layers"),
        dtype="fp32",
        optimizer=False,
        checkpoint=2 * gb,
        written=gb,
        extractions=[
            ExtractionCost(s, gb, p * gb // 10, gb) for s, p in ((4, 25), (5, 28), (9, 26))
        ],
        copies=[Copying(1.0, 1.5), Copying(0.5, 1.5), Copying(2.0, 6.0)],
    )


def test_the_largest_peak_and_the_median_times_count(found):
    assert found.memory_ratio == pytest.approx(1.4)
    assert found.time_ratio == pytest.approx(5 / 2.5)


def test_json_has_every_measurement_and_the_limits(found):
    content = json.loads(json.dumps(found.as_dict()))
    assert content["memory_ratio"] == found.memory_ratio
    assert content["limits"] == {"memory": 1.5, "time": 3.0}
    assert content["extractions"][1] == {
        "seconds": 5,
        "before": 10**9,
        "peak": 28 * 10**8,
        "peak_anonymous": 10**9,
    }


def test_a_person_reads_both_ratios(found):
    lines = dict(line.split("  ", 1) for line in render(found).splitlines())
    words = {name.strip(): value.strip() for name, value in lines.items() if name}
    assert words["model"] == "24 layers -> 20 layers"
    assert words["checkpoint"] == "2.000 GB"
    assert words["extraction"] == "5.00 s (4.00 to 9.00, 3 rounds)"
    assert words["memory / checkpoint"] == "1.40 (limit 1.5)"
    assert words["time / plain time"] == "2.00 (limit 3.0)"


@pytest.mark.parametrize("size", [0, 1, (1 << 24) + 5])
def test_copying_reads_all_and_leaves_nothing(size, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    sizes, flush = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda h: (sizes.append(os.fstat(h).st_size), flush(h)))
    copying = measure_copying(source, tmp_path / "copy")
    assert copying.read > 0 and copying.write > 0
    assert sizes == [size]
    assert os.listdir(tmp_path) == ["source"]


def test_a_budget_has_no_shape_to_extract(tiny_yaml, tmp_path):
    budget = ["model.l0_module.target_model=null", "model.l0_module.target_density=0.5"]
    message = r"tiny has no target shape to extract\. To fix, choose a configuration with"
    with pytest.raises(ConfigError, match=message):
        measure(load_config([tiny_yaml], budget), tmp_path)
