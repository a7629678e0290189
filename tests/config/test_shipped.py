"""Which files a command line names."""

import re
from pathlib import Path

import pytest

from bge_pruning.config import shipped
from bge_pruning.config.load import load_config
from bge_pruning.config.schema import ConfigError
from bge_pruning.config.shipped import find_config, list_shipped, split_arguments

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("paths", "overrides"),
    [
        ([], []),
        (["a.yaml", "b/c.yaml"], []),
        (["a.yaml", "b.yaml"], ["seed=1", "x.y=[1, 2]"]),
        ([], ["seed=", "=1", "a=b=c"]),
        ([], ["run_name=модель 🐈"]),
        ([], ["seed=1", "seed=1"]),
        ([], ["data.train=[{path: a\x00b}]"]),
        ([], ["data.train=" + "x" * 300]),
    ],
    ids=["none", "files", "both", "odd", "unicode", "twice", "null byte", "long"],
)
def test_arguments_are_split(paths, overrides):
    assert split_arguments([*paths[:1], *overrides, *paths[1:]]) == (paths, overrides)


def test_a_file_whose_name_looks_like_an_override_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.yaml").write_text("")
    assert split_arguments(["lr=1.yaml", "lr=2.yaml"]) == (["lr=1.yaml"], ["lr=2.yaml"])


def test_every_configuration_of_the_repository_has_a_name():
    expected = {str(p.relative_to(CONFIGS).with_suffix("")): p for p in CONFIGS.rglob("*.yaml")}
    assert list_shipped() == expected
    assert len(expected) > 20


@pytest.mark.parametrize("name", ["bge_m3/target_50pct", "bge_m3/target_50pct.yaml"])
def test_a_name_is_found_from_any_folder_with_what_it_extends(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == CONFIGS / "bge_m3" / "target_50pct.yaml"
    config = load_config([name], ["seed=5"])
    assert (config.run_name, config.seed) == ("bge-m3-target-50pct", 5)
    assert config.model.base_model == "BAAI/bge-m3"
    mine = tmp_path / name
    mine.parent.mkdir()
    mine.write_text("seed: 7")
    assert find_config(name) == Path(name)  # a file comes before a name


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("bge_m3/target_55pct", r"check the path, or name .*: did you mean .*target_50pct.*\?"),
        ("target_50pct", r".* did you mean bge_m3/target_50pct or .*\? There are bge_m3/base, "),
        ("configs/bge_m3/bsae.yaml", r".* did you mean bge_m3/base\? There are bge_m3/base, "),
        ("elephant", r"check the path, or name a shipped configuration: bge_m3/base, "),
        ("elephant.yaml", r"check the path\.$"),
    ],
)
def test_neither_a_file_nor_a_name(name, fix, monkeypatch):
    with pytest.raises(ConfigError, match=rf"^{re.escape(name)}: no such file\. To fix, {fix}"):
        find_config(name)
    monkeypatch.setattr(shipped, "FOLDERS", ())  # an installation without configurations
    with pytest.raises(ConfigError, match=r"To fix, check the path\.$"):
        find_config(name)
