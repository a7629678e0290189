"""A study on the tiny model: what a cell holds, resuming, refusals, and l0 beside a baseline."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from bge_pruning import train
from bge_pruning.config.load import ConfigError
from bge_pruning.model_io.checkpoint import find_checkpoint, load_trained_model
from bge_pruning.models.l0_module_embedding import distances_to_binary
from bge_pruning.reports.comparison_report import write_study_report
from bge_pruning.reports.study_records import StudyCell, read_cells, read_reference
from bge_pruning.utils.files import lock_of
from bge_pruning.utils.json_records import parse_record
from bge_pruning.utils.run_log import StoppedError
from bge_pruning.workflows import study as study_module
from bge_pruning.workflows.study import run_study
from bge_pruning.workflows.study_file import (
    cell_config,
    cell_file,
    describe_config,
    find_differences,
    flatten,
    hash_config,
    list_cells,
    read_study,
    select_cells,
    unfinished,
)
from tests.common.script_process import load_script

OVERRIDES = ["recovery.max_duration=3ba", "save_interval=1ba"]
TARGET = (
    "model.l0_module.target_model={d_model: 24, n_heads: 3, n_layers: 3, intermediate_size: 48}"
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory, write_collection) -> Path:
    """A collection whose name is not that of the pairs."""
    return write_collection(tmp_path_factory.mktemp("retrieval") / "documents")


@pytest.fixture(scope="module")
def make_study(make_yaml, sts_csv, documents):
    """A function that writes a study of l0 and random at one size into a folder, and reads it."""

    def make(folder: Path, **changes: object):
        make_yaml(folder)
        content = {
            "base": ["tiny.yaml"],
            "overrides": OVERRIDES,
            "methods": {"l0": [], "random": ["method=random"]},
            "sizes": {"half": [TARGET]},
            "seeds": [5],
            "sts": [str(sts_csv)],
            "retrieval": {str(documents): "test"},
            "modes": ["dense", "sparse", "colbert"],
            "results_folder": str(folder / "quality"),
            "run_folder": str(folder / "cells"),
        }
        path = folder / "study.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}))
        return read_study(path)

    return make


@pytest.fixture(scope="module", autouse=True)
def no_reports():
    """The report of each training takes longer than the training."""
    from bge_pruning.training import run_report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "write_report", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_study, no_reports):
    """A study that was run to its end."""
    study = make_study(tmp_path_factory.mktemp("study"))
    run_study(study)
    return study


@pytest.fixture(scope="module")
def cells(finished) -> dict[str, dict]:
    return {cell.method: cell.as_dict() for cell in read_cells(finished.results)}


# What a cell holds


def test_l0_and_a_baseline_have_the_same_size_steps_and_nearly_the_same_tokens(cells):
    ours, theirs = cells["l0"], cells["random"]
    assert ours["parameters"] == theirs["parameters"]
    assert ours["encoder_share"] == theirs["encoder_share"]
    assert ours["steps"] == {"prune": 4, "recover": 3}
    assert theirs["steps"] == {"recover": 7}
    counts = [sum(cell["tokens"].values()) for cell in (ours, theirs)]
    assert all(count > 7 * 8 * 2 * 3 for count in counts)  # rows of two texts
    assert counts[0] == pytest.approx(counts[1], rel=0.2)


def test_records_are_of_their_schemas_and_all_that_is_left(finished, cells):
    for cell in cells.values():
        parse_record(cell, StudyCell, "cell", "look")
        assert cell["config_hash"] == hash_config(cell["config"])
    read_reference(finished.results)
    assert not list(finished.runs.iterdir())
    assert {path.name for path in finished.results.iterdir()} >= {"cells", "reference.json"}
    names = {path.name for path in (finished.results / "cells").iterdir()}
    assert names == {"l0-half-seed5.json", "random-half-seed5.json"}


def test_a_cell_has_every_score_and_its_retention(cells, finished):
    reference = read_reference(finished.results).as_dict()
    originals = {(e["task"], e["mode"]): e["value"] for e in reference["scores"]["original"]}
    assert len(originals) == 6
    for cell in cells.values():
        found = {(e["task"], e["mode"]): e for e in cell["scores"]}
        assert found.keys() == originals.keys()
        for key, entry in found.items():
            if originals[key] > 0:
                assert entry["retention"] == pytest.approx(entry["value"] / originals[key])


def test_the_original_is_scored_as_evaluation_does_it(finished, model_folder, sts_csv, documents):
    from bge_pruning.evaluation.evaluate import evaluate
    from bge_pruning.evaluation.tasks import find_tasks

    tasks = find_tasks([str(sts_csv)], [str(documents)])
    modes = ["dense", "sparse"]
    result = evaluate(str(model_folder), None, tasks, modes, speed=False, device="cpu")
    reference = read_reference(finished.results).as_dict()["scores"]
    found = {(e["task"], e["mode"]): e["value"] for e in reference["original"]}
    floors = {
        name: {(e["task"], e["mode"]): e["value"] for e in reference[name]}
        for name in ("word_embeddings", "random_weights")
    }
    for entry in (entry.as_dict() for entry in result.main_scores()):
        key = (entry["task"], entry["mode"])
        assert entry["value"] == pytest.approx(found[key], abs=1e-6)
        for name, value in entry["floors"].items():
            assert value == pytest.approx(floors[name][key], abs=1e-6)


def test_gates_are_described_for_l0_alone(cells):
    assert cells["random"]["gates"] is None
    gates = cells["l0"]["gates"]
    assert gates["distance"].keys() == {"head", "hidden", "intermediate", "layer", "all"}
    assert all(0 < value < 0.5 for value in gates["distance"].values())
    assert gates["gap"].keys() == {"head", "hidden", "intermediate", "layer", "encoder"}
    # In four steps the gates hardly move: they are open, and the target is not reached.
    assert gates["gap"]["encoder"] < -0.3
    axes = {"layer": torch.tensor([0.9, 0.2]), "head": torch.tensor([[1.0, 0.5], [0.0, 0.5]])}
    expected = {"layer": 0.15, "head": 0.25, "all": (0.3 + 1.0) / 6}
    assert distances_to_binary(axes) == pytest.approx(expected)


def test_what_a_cut_costs(cells, finished):
    for cell in cells.values():
        (loss,) = cell["cut"].values()
        assert loss["lost"] == pytest.approx(loss["before"] - loss["after"])
    reference = read_reference(finished.results).as_dict()["scores"]["original"]
    original = next(e for e in reference if e["kind"] == "similarity" and e["mode"] == "dense")
    assert cells["random"]["cut"]["tiny"]["before"] == original["value"]
    # Before its cut, the model of open gates is nearly the original, trained for four steps.
    assert cells["l0"]["cut"]["tiny"]["before"] != original["value"]


def test_median_gates_are_the_middle_of_sampled_ones(train_tiny, tmp_path):
    gates = load_trained_model(find_checkpoint(train_tiny(tmp_path))).l0_module
    with torch.no_grad():
        gates.log_alpha["intermediate"].fill_(0.3)
    draws = []
    for step in range(200):
        gates.step = step
        draws.append(gates.sample_masks().intermediate)
    median = gates.median_masks().intermediate
    assert 0.5 < float(median[0, 0]) < 0.9
    assert float(torch.stack(draws).median()) == pytest.approx(float(median[0, 0]), abs=0.02)


# Going on


def test_a_finished_study_runs_nothing(finished, monkeypatch):
    monkeypatch.setattr(study_module, "run_cell", lambda *_: pytest.fail("ran a cell"))
    files = run_study(finished)
    assert files == [cell_file(finished, cell) for cell in list_cells(finished)]


def test_a_study_killed_after_one_cell_goes_on_with_the_next(make_study, tmp_path, monkeypatch):
    study = make_study(tmp_path, sts=[], modes=["dense"])
    real, ran = study_module.run_cell, []

    def killed(study, cell, *rest):
        ran.append(cell.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(study, cell, *rest)

    monkeypatch.setattr(study_module, "run_cell", killed)
    with pytest.raises(StoppedError, match="by Ctrl-C. To go on, run the same command again"):
        run_study(study)
    first, second = (cell_file(study, cell) for cell in list_cells(study))
    kept = first.read_bytes()
    assert run_study(study, ["method=random"]) == [second]  # a part can be run
    assert ran == ["l0-half-seed5", "random-half-seed5", "random-half-seed5"]
    assert first.read_bytes() == kept
    assert len(read_cells(study.results)) == 2


def test_ranks_of_one_launch_do_not_share_a_study(make_study, tmp_path, monkeypatch):
    """Each would train a cell of its own, and the gradients would be mixed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"one process.*To fix, start it without a launcher"):
        run_study(make_study(tmp_path))


@pytest.mark.slow
def test_processes_share_the_cells(make_study, tmp_path, monkeypatch):
    study, ran = make_study(tmp_path, sts=[], modes=["dense"], seeds=[5, 6]), []

    def beside(study, cell, *rest):
        """While it is at a cell, another process runs the study to its end."""
        ran.append(cell.name)
        if len(ran) == 1:
            run_study(study)
        return theirs.model_copy(update={"config": describe_config(study, cell)})

    run_study(study, ["method=l0", "seed=5"])
    path = cell_file(study, list_cells(study)[0])
    (theirs,) = read_cells(study.results)
    path.unlink()
    monkeypatch.setattr(study_module, "run_cell", beside)
    run_study(study)
    assert ran == [cell.name for cell in list_cells(study)]
    assert all(cell_file(study, cell).is_file() for cell in list_cells(study))
    assert not list(study.runs.iterdir())


def test_a_process_that_gets_no_cell_leaves_the_report_to_the_others(make_study, tmp_path, capsys):
    study = make_study(tmp_path, sts=[], modes=["dense"], methods={"random": ["method=random"]})
    (cell,) = list_cells(study)
    with lock_of(study.runs / cell.name):
        assert load_script("run_quality_study").main([str(tmp_path / "study.yaml")]) == 0
    assert "all cells are being run by other processes" in capsys.readouterr().out
    assert not (study.results / "table.md").exists()


@pytest.mark.slow
def test_a_cell_stopped_in_its_recovery_goes_on_there(make_study, tmp_path, monkeypatch, cells):
    study = make_study(tmp_path)
    real = train.train
    started = []

    def killed(config):
        started.append(config.stage)
        if started == ["prune", "recover"]:
            config.max_duration = "1ba"  # saved after the first of three steps
            real(config)
            raise KeyboardInterrupt
        return real(config)

    monkeypatch.setattr(train, "train", killed)
    only = ["method=l0"]
    with pytest.raises(KeyboardInterrupt):
        run_study(study, only)
    assert not (study.results / "cells").exists()
    assert (study.runs / "l0-half-seed5-recovery" / "latest-rank0.pt").exists()
    run_study(study, only)
    assert started == ["prune", "recover", "recover"]
    cell = read_cells(study.results)[0].as_dict()
    assert cell["steps"] == {"prune": 4, "recover": 3}
    assert cell["tokens"] == cells["l0"]["tokens"]
    assert not list(study.runs.iterdir())


@pytest.mark.slow
def test_runs_of_another_configuration_are_not_gone_on_with(make_study, tmp_path, monkeypatch):
    real = train.train

    def killed(config):
        real(config)
        raise KeyboardInterrupt

    changes = {"retrieval": {}, "modes": ["dense"]}
    study = make_study(tmp_path, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, ["method=l0"])
    study = make_study(tmp_path, overrides=[*OVERRIDES, "max_duration=2ba"], **changes)
    run_study(study, ["method=l0"])
    cell = read_cells(study.results)[0].as_dict()
    assert cell["steps"] == {"prune": 2, "recover": 3}


# Other configurations


@pytest.fixture
def changed(finished, make_study, tmp_path):
    """A function that gives the finished study with something changed, in the same folders."""

    def change(**changes):
        shutil.copytree(finished.results, tmp_path / "quality")
        return make_study(tmp_path, **changes)

    return change


def test_cells_of_another_configuration_are_kept(changed, finished):
    study = changed(overrides=[*OVERRIDES, "optimizer.lr=0.002"])
    message = r"l0-half-seed5\.json is of another configuration \(optimizer\.lr was 0\.001 and is 0"
    with pytest.raises(ConfigError, match=message):
        run_study(study)
    assert unfinished(study, list_cells(study), overwrite=True) == list_cells(study)
    other = finished.model_copy(update={"modes": ["dense"]})
    with pytest.raises(ConfigError, match=r"\(judged_by\.modes\.1 was 'sparse' and is None\)"):
        run_study(other)


def test_what_is_trained_on_judges_no_study(make_study, tmp_path):
    study = make_study(tmp_path, overrides=[*OVERRIDES, "data.on_trained_eval=error"])
    with pytest.raises(
        ConfigError, match="tiny: 40 of 40 pairs are trained on too, in train, such"
    ):
        run_study(study)
    assert not study.results.exists()


def test_what_does_not_matter_is_not_another_configuration(changed):
    incidental = ["log_interval=2ba", "save_interval=2ba", "progress_bar=true"]
    incidental += ["data.on_trained_eval=error", "teacher.cache=true"]
    study = changed(overrides=["recovery.max_duration=3ba", *incidental], run_folder="elsewhere")
    assert unfinished(study, list_cells(study)) == []


def test_of_gates_nothing_matters_to_a_baseline_but_their_target(changed):
    gates = ["optimizer.l0_lr=0.3", "model.l0_module.init_std=2.0"]
    # One step more of gates and one less of recovery: as many in all, which is what a baseline has.
    steps = ["max_duration=5ba", "recovery.max_duration=2ba"]
    study = changed(overrides=["save_interval=1ba", *gates, *steps])
    assert [cell.method for cell in unfinished(study, list_cells(study), overwrite=True)] == ["l0"]
    target = TARGET.replace("intermediate_size: 48", "intermediate_size: 32")
    resized = study.model_copy(update={"sizes": {"half": [target]}})
    assert len(unfinished(resized, list_cells(resized), overwrite=True)) == 2


def test_a_key_that_came_later_has_its_default(finished):
    now = describe_config(finished, list_cells(finished)[0])
    then = {key: value for key, value in now.items() if key != "optimizer.eps"}
    assert find_differences(then, now) == []
    assert find_differences(then, {**now, "optimizer.eps": 1.0}) == ["optimizer.eps"]
    then = {key: value for key, value in now.items() if not key.endswith("in_batch_negatives")}
    assert then != now
    assert find_differences(then, now) == []
    content = {"a": {"b": [1, {"c": 2}], "d": []}, "e": None}
    assert flatten(content) == {"a.b.0": 1, "a.b.1.c": 2, "a.d": [], "e": None}


def test_another_original_needs_another_folder(changed, projected_folder):
    study = changed(original=str(projected_folder))
    shutil.rmtree(study.results / "cells")
    message = r"reference\.json is of another original or other tasks and is kept.* To fix, set an"
    with pytest.raises(ConfigError, match=message):
        run_study(study)


def test_floors_are_measured_again_without_a_cell(changed, monkeypatch):
    study = changed()
    path = study.results / "reference.json"
    before = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(study_module, "run_cell", lambda *_: pytest.fail("a cell was run"))
    assert len(run_study(study)) == len(list_cells(study))
    assert json.loads(path.read_bytes()) == json.loads(before)


def test_a_reference_that_another_process_is_measuring_is_waited_for(
    finished, tmp_path, monkeypatch
):
    study = finished.model_copy(update={"results_folder": str(tmp_path / "quality")})

    @contextmanager
    def waited(path):
        shutil.copytree(finished.results, study.results)
        yield

    monkeypatch.setattr(study_module, "lock_of", waited)
    monkeypatch.setattr(study_module, "measure_reference", lambda *_: pytest.fail("measured"))
    config = cell_config(study, list_cells(study)[0], "prune")
    tasks = study_module.find_study_tasks(study)
    assert study_module._find_reference(study, config, tasks) == read_reference(finished.results)


# What is refused before any work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ["fast"]}, r"fast"),
        (
            {"sizes": {"half": ["model.l0_module=null"]}},
            r"l0-half-seed5: model\.l0_module is null: there is nothing to prune\. To fix, give",
        ),
        (
            {"sizes": {"half": ["model.l0_module.target_model={d_model: 24, n_heads: 4}"]}},
            r"needs d_model 32, not 24",
        ),
        ({"sizes": {"half": [TARGET], "b": [TARGET, "model.base_model=./none"]}}, r"none"),
        (
            {"sizes": {"half": [TARGET], "b": [TARGET, "model.base_model={copy}"]}},
            r"the cells prune different models: .* To fix, make a",
        ),
        (
            {"methods": {"random": ["method=random", "max_duration=1ep"]}},
            r"random-half-seed5: max_duration 1ep and recovery\.max_duration 3ba have different",
        ),
        (
            {"retrieval": {"{collection}": "test"}},
            r"two tasks are called tiny\. To fix, rename",
        ),
        ({"parallel": {"{collection}": ["de-en"]}}, r"tiny: has no {language}\. To fix, write"),
        (
            {"retrieval": {"${oc.env:BGE_PRUNING_DATA}/a": "test"}},
            r"'\${oc\.env:BGE_PRUNING_DATA}/a' needs the environment variable BGE_PRUNING_DATA, w",
        ),
        (
            {"overrides": [*OVERRIDES, "recovery.data.eval=[{name: a, kind: sts, path: a.csv}]"]},
            r"a\.csv: no such file",
        ),
    ],
)
def test_wrong_cells(changes, message, make_study, tmp_path, monkeypatch, model_folder, collection):
    monkeypatch.setattr(study_module, "run_cell", lambda *_: pytest.fail("ran a cell"))
    monkeypatch.delenv("BGE_PRUNING_DATA", raising=False)
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    text = json.dumps(changes).replace("{copy}", str(copy))
    study = make_study(tmp_path, **json.loads(text.replace("{collection}", str(collection))))
    with pytest.raises((ConfigError, ValueError, OSError), match=message):
        run_study(study)
    assert not study.results.exists()


def test_the_report_is_made_of_the_cells_alone(finished):
    path = write_study_report(finished.results)
    assert path.name == "table.md"
    first = path.read_text()
    assert write_study_report(finished.results).read_text() == first
    assert "| half | l0 |" in first and "| half | random |" in first
    assert select_cells(finished, ["method=l0"])
