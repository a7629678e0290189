"""What length grouping is worth, measured on the tiny model."""

import pytest

from bge_pruning.config import ConfigError, load_config
from bge_pruning.data_benchmark import SourceSpeed, measure_grouping, render_speeds


def test_every_source_is_measured_with_and_without(tiny_yaml, sts_csv, contrastive_jsonl):
    config = load_config(
        [tiny_yaml],
        [
            f"data.train=[{{name: pairs, kind: sts, path: {sts_csv}}},"
            f" {{name: asked, kind: contrastive, path: {contrastive_jsonl}}}]",
            "loss.contrastive=1",
        ],
    )
    speeds = measure_grouping(config, batches=5)
    assert [speed.name for speed in speeds] == ["pairs", "asked"]
    for speed in speeds:
        assert 0 < speed.padding[0] < speed.padding[1] < 1
        assert min(*speed.loading, *speed.training) > 0
    assert not (tiny_yaml.parent / "runs").exists()


def test_what_cannot_be_trained_cannot_be_measured(tiny_yaml):
    with pytest.raises(ConfigError, match="data.train is empty"):
        measure_grouping(load_config([tiny_yaml], ["data.train=[]"]), batches=1)


def test_table():
    table = render_speeds([SourceSpeed("mine", (0.1, 0.5), (2000.0, 1000.0), (30.0, 20.0))])
    assert table.splitlines()[-1].split() == [
        *("mine", "10.0%", "50.0%", "2,000", "1,000", "30.0", "20.0", "1.50")
    ]
