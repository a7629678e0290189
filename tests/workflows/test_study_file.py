"""STUDY.yaml: what is read, in which order its cells come, what is refused."""

from pathlib import Path

import pytest
import yaml

from bge_pruning.config.load import ConfigError, load_config
from bge_pruning.models.encoder_shape import count_parameters
from bge_pruning.selection.layer_choice import layers_within
from bge_pruning.training.plan import build_plan, example_target
from bge_pruning.workflows.study_file import (
    cell_config,
    cell_file,
    describe_config,
    list_cells,
    read_study,
    select_cells,
    unfinished,
)

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "quality").glob("study*.yaml"))
CONTENT = {
    "base": ["tiny.yaml"],
    "methods": {"l0": [], "random": ["method=random"]},
    "sizes": {"large": ["max_duration=5ba"], "small": ["max_duration=6ba", "seed=99"]},
    "seeds": [4, 2],
    "sts": ["a.csv"],
}


@pytest.fixture
def write(tmp_path, tiny_yaml):
    """A function from changes of CONTENT to a file."""

    def write(**changes: object) -> Path:
        content = {**CONTENT, **changes}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write


def test_every_beginning_has_all_methods_at_the_first_sizes(write):
    names = [cell.name for cell in list_cells(read_study(write()))]
    cells = ("l0-large", "random-large", "l0-small", "random-small")
    assert names == [f"{cell}-seed{seed}" for seed in (4, 2) for cell in cells]


def test_the_configuration_of_a_cell(write):
    study = read_study(write(overrides=["optimizer.lr=0.5", "max_duration=9ba"]))
    cell = list_cells(study)[3]
    config = cell_config(study, cell, "prune")
    assert (config.method, config.seed, config.max_duration) == ("random", 4, "6ba")
    assert (config.optimizer.lr, config.autoresume, config.overwrite) == (0.5, True, False)
    folder = Path("experiments/checkpoints/quality/random-small-seed4")
    assert Path(config.run_folder) == folder
    recovery = cell_config(study, cell, "recover")
    assert Path(recovery.run_folder) == Path(f"{folder}-recovery")
    assert recovery.max_duration == "12ba"


def test_what_judges_a_cell_is_known_as_it_is_written(write):
    """A study without parallel texts is what it was before there were any."""
    studies = [
        read_study(write(**more)) for more in ({}, {"parallel": {"a.{language}": ["de-en"]}})
    ]
    plain, judged = (describe_config(study, list_cells(study)[0]) for study in studies)
    assert not [key for key in plain if key.startswith(("judged_by.parallel", "judged_by.lines"))]
    assert {key: value for key, value in judged.items() if key not in plain} == {
        "judged_by.parallel.a.{language}.0": "de-en",
        "judged_by.lines": "-400:",
    }


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["method=l0", "seed=2"], ["l0-large-seed2", "l0-small-seed2"]),
        (["size=small", "seed=4"], ["l0-small-seed4", "random-small-seed4"]),
        (["method=l0,random", "size=large", "seed=4"], ["l0-large-seed4", "random-large-seed4"]),
        (["method=l0", "method=random"], []),
    ],
)
def test_a_part_of_the_cells(only, expected, write):
    assert [cell.name for cell in select_cells(read_study(write()), only)] == expected


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("l0", r"--only l0: is not KEY=VALUES with a key of method, size, seed\. To fix, write"),
        ("model=l0", r"--only model=l0: is not KEY=VALUES"),
        ("size=tiny", r"the study has no size 'tiny', but large, small\. To fix, choose"),
        ("seed=4,5", r"the study has no seed '5', but 4, 2\. To fix"),
    ],
)
def test_parts_that_are_not_there(only, message, write):
    with pytest.raises(ConfigError, match=message):
        select_cells(read_study(write()), [only])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, r"study\.yaml: unknown key 'method': did you mean 'methods'\?"),
        ({"zebra": 1}, r"study\.yaml: unknown key 'zebra': known: base, overrides, methods"),
        ({"methods": None}, r"study\.yaml: has no methods\. To fix, see configs/quality/study"),
        ({"methods": {}}, r"study\.yaml: methods is empty\. To fix"),
        ({"methods": {"l0": "method=l0"}}, r"methods\.l0 is \"method=l0\", expected a list"),
        ({"methods": {"a/b": []}}, r"methods 'a/b' is no name of letters, .* To fix, rename it"),
        ({"seeds": [1, 1]}, r"seeds names 1 twice\. To fix, name it once"),
        ({"seeds": ["one"]}, r"seeds\[0\] is \"one\", expected a whole number"),
        ({"sts": None}, r"nothing to judge by\. To fix, name files under sts, folders un"),
        ({"parallel": {"x": "de-en"}}, r"parallel\.x is .*, expected a list"),
        ({"modes": ["dense", "dense"]}, r"modes names dense twice"),
        ({"retrieval": ["a"]}, r"retrieval is a list, expected an object with keys"),
    ],
)
def test_wrong_studies(changes, message, write):
    with pytest.raises(ConfigError, match=message):
        read_study(write(**changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", r"must hold 'key: value' pairs\. To fix, see configs/"),
        ("base: [", r"study\.yaml:\d: is not YAML"),
        ("seeds: [1]\nseeds: [2]", r"study\.yaml:2: is not YAML \(.*seeds"),
    ],
)
def test_texts_that_are_no_study(text, message, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_study(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file\. To fix, check the path"):
        read_study(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read .* To fix, name a YAML file"):
        read_study(tmp_path)


def test_a_wrong_override_names_its_cell(write):
    study = read_study(write(methods={"odd": ["optimizer.lrr=1"]}))
    with pytest.raises(ConfigError, match=r"odd-large-seed4: .* did you mean 'lr'\?"):
        cell_config(study, list_cells(study)[0], "prune")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_name_what_is_here(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    for name in (*study.base, *study.sts, *study.retrieval):
        assert Path(name).exists(), name
    for folder, split in study.retrieval.items():
        assert (Path(folder) / "qrels" / f"{split}.tsv").is_file()
    # A seed is only a number: one is enough to see what its cells train on.
    for cell in select_cells(study, [f"seed={study.seeds[0]}"]):
        config = cell_config(study, cell, "prune")
        trained = {(s.path, s.split if s.kind == "beir" else None) for s in config.data.train}
        judged = {(path, None) for path in study.sts} | set(study.retrieval.items())
        assert not trained & judged
    lines = path.read_text(encoding="utf-8").splitlines()
    assert f"#   python scripts/run_quality_study.py {path.relative_to(ROOT)}" in lines
    assert any("easured cost:" in line for line in lines)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_cells_of_shipped_studies_are_not_run_again(path, monkeypatch):
    """What a key means, or its default, may change; what was measured with it stays."""
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    firsts = {cell.method: cell for cell in list_cells(study) if cell_file(study, cell).is_file()}
    assert unfinished(study, list(firsts.values())) == []


OF_SHAPES = ROOT / "configs" / "quality" / "study_shape.yaml"


def test_shipped_shapes_have_the_same_share(monkeypatch):
    """Half, as the gates may choose; and no two are alike."""
    monkeypatch.chdir(ROOT)
    study = read_study(OF_SHAPES)
    configs = [cell_config(study, cell, "prune") for cell in list_cells(study)]
    for config in configs:
        config.model.base_model = "not here"  # the sizes are those of the file
    plans = [build_plan(config) for config in configs]
    for plan in plans:
        found = example_target(plan)
        share = count_parameters(found).encoder / count_parameters(plan.source).encoder
        assert share == pytest.approx(0.501, abs=0.003)
    assert [plan.target is None for plan in plans] == [False] * 5 + [True] * 2
    assert len({plan.target for plan in plans[:5]}) == 5
    assert [config.model.l0_module.target_speedup for config in configs] == [None] * 6 + [1.93]


@pytest.mark.parametrize("path", sorted({*STUDIES} - {OF_SHAPES}), ids=lambda path: path.stem)
def test_shipped_sizes_are_nested_and_have_their_share(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    larger = None
    for name, overrides in study.sizes.items():
        config = load_config(study.base, [*study.overrides, *overrides])
        config.model.base_model = "not here"  # the sizes are those of the file
        plan = build_plan(config)
        share = count_parameters(plan.target).encoder / count_parameters(plan.source).encoder
        assert share == pytest.approx(float(name.removesuffix("pct")) / 100, abs=0.005)
        fields = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
        sizes = [getattr(plan.target, field) for field in fields]
        assert larger is None or all(a <= b for a, b in zip(sizes, larger, strict=True))
        larger = sizes
        budget = count_parameters(plan.target).encoder
        assert layers_within(plan.source, budget) == {"75pct": 4, "60pct": 3, "50pct": 3}[name]
