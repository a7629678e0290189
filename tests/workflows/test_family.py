"""Several sizes from one run: nested, each trained on from the larger one, compared, resumable."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bge_pruning.config.load import ConfigError
from bge_pruning.export.extract import write_model
from bge_pruning.export.extraction import nested_extraction, start_extraction
from bge_pruning.export.pruning_record import MARKER
from bge_pruning.model_io.checkpoint import cut, find_checkpoint
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.workflows import family
from bge_pruning.workflows.family import choose_members, cut_member, export_family, is_done
from bge_pruning.workflows.stages import EvaluationPlan
from tests.common.trainings import read_json

OVERRIDES = ["recovery.max_duration=3ba", "seed=5"]
DENSITIES = [0.5, 0.75]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_yaml, sts_csv) -> tuple[Path, list[Path]]:
    """The folder of a run of four steps, and the results folders of its two sizes."""
    folder = tmp_path_factory.mktemp("family")
    plan = EvaluationPlan([str(sts_csv)])
    return folder, export_family([str(make_yaml(folder))], OVERRIDES, DENSITIES, plan)


@pytest.fixture(scope="module")
def pruned(finished) -> Path:
    return finished[0] / "runs" / "tiny"


@pytest.fixture(scope="module")
def sizes(finished) -> list[Path]:
    return finished[1]


def test_every_size_has_its_share_and_lies_in_the_larger_one(sizes):
    infos = [read_json(folder / "model" / MARKER) for folder in sizes]
    assert [folder.name for folder in sizes] == ["75pct", "50pct"]
    for info, density in zip(infos, (0.75, 0.5), strict=True):
        parameters = info["parameters"]
        share = parameters["extracted"]["encoder"] / parameters["source"]["encoder"]
        assert share == pytest.approx(density, abs=0.01)
        counted = count_parameters(EncoderShape(**info["shape"])).as_dict()
        assert parameters["extracted"] == counted
    for large, small in pairwise(info["kept"] for info in infos):
        assert set(small["layer"]) <= set(large["layer"])
        assert set(small["hidden"]) <= set(large["hidden"])


def test_the_smaller_one_is_cut_from_the_recovered_larger_one(sizes):
    large, small = sizes
    kept_large, kept_small = (
        read_json(folder / "model" / MARKER)["kept"] for folder in (large, small)
    )
    columns = [kept_large["hidden"].index(index) for index in kept_small["hidden"]]
    name = "embeddings.position_embeddings.weight"
    recovered, cut, unrecovered = (
        load_base_model(str(folder)).backbone.state_dict()[name]
        for folder in (large / "model", small / "pruned_model", large / "pruned_model")
    )
    assert torch.equal(cut, recovered[:, columns])
    assert not torch.equal(recovered, unrecovered)


def test_the_record_counts_in_the_unpruned_models_numbering(sizes, pruned, messages):
    members = choose_members(pruned, DENSITIES)
    assert sum("gates were far from what is cut" in text for text in messages.messages) == 1
    for folder, member in zip(sizes, members, strict=True):
        info = read_json(folder / "model" / MARKER)
        assert info["kept"] == member.keep.as_dict()
        constraint = {axis: row.as_dict() for axis, row in member.constraint.items()}
        assert info["constraint"] == constraint
        assert (
            info["source"]["base_model"]
            == read_json(sizes[0] / "model" / MARKER)["source"]["base_model"]
        )
    assert info["batches"] == {"prune": 4, "recover_larger": 3, "recover": 3}


def test_masked_equals_extracted_for_a_nested_cut(sizes, pruned, tmp_path):
    """The smaller cut of the unrecovered larger model is the smaller cut of the run itself."""
    large, small = choose_members(pruned, DENSITIES)
    checkpoint = find_checkpoint(pruned)
    cut_member(small, checkpoint, tmp_path / "direct", nested=False)
    # As a recovery that trained nothing would leave it.
    whole = start_extraction(checkpoint, large.shape)
    cut(whole.base.backbone, whole.base.heads, whole.keep)
    unrecovered = replace(whole, shape=large.shape)
    write_model(
        lambda: nested_extraction(unrecovered, small.keep, small.shape, small.constraint),
        tmp_path / "nested",
    )
    nested, direct = (load_base_model(str(tmp_path / name)) for name in ("nested", "direct"))
    for part in ("backbone", "heads"):
        state = getattr(direct, part).state_dict()
        for name, value in getattr(nested, part).state_dict().items():
            assert torch.equal(value, state[name]), name
    records = [read_json(tmp_path / name / MARKER) for name in ("nested", "direct")]
    for key in ("kept", "shape", "parameters", "constraint", "source", "source_shape"):
        assert records[0][key] == records[1][key]


def test_every_size_is_evaluated_reported_and_compared(sizes):
    for folder in sizes:
        assert {"evaluation.json", "report.html", "config.yaml", "model", "pruned_model"} <= {
            path.name for path in folder.iterdir()
        }
        assert "Quality: not measured" not in (folder / "model" / "README.md").read_text()
    beside = sizes[0].parent
    names = "75pct 50pct comparison.json comparison.md pareto.png".split()
    assert {path.name for path in beside.iterdir()} == set(names)
    text = (beside / "comparison.md").read_text(encoding="utf-8")
    assert "75pct" in text and "50pct" in text


def test_what_is_there_is_kept(finished, sizes, pruned, sts_csv, monkeypatch):
    monkeypatch.setattr("bge_pruning.train.train", lambda config: pytest.fail(config.run_folder))
    before = (sizes[1] / "model" / "model.safetensors").stat().st_mtime_ns
    yaml = str(finished[0] / "tiny.yaml")
    plan = EvaluationPlan([str(sts_csv)])
    assert export_family([yaml], OVERRIDES, DENSITIES, plan, pruned) == sizes
    assert (sizes[1] / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_what_is_done(sizes, pruned):
    """A cut that was not recovered is not done, nor is another size."""
    large, small = choose_members(pruned, DENSITIES)
    assert is_done(sizes[1] / "model", small)
    assert not is_done(sizes[1] / "pruned_model", small)
    assert not is_done(sizes[1] / "model", large)
    assert not is_done(sizes[1] / "gone", small)


def test_a_size_of_other_gates_is_not_replaced(finished, sizes, pruned, sts_csv, monkeypatch):
    monkeypatch.setattr(family, "_make", lambda *_: pytest.fail("makes a size"))
    marker = sizes[1] / "model" / MARKER
    text = marker.read_text(encoding="utf-8")
    info = json.loads(text)
    info["kept"]["layer"] = [99]
    marker.write_text(json.dumps(info), encoding="utf-8")
    yaml, plan = str(finished[0] / "tiny.yaml"), EvaluationPlan([str(sts_csv)])
    message = r"50pct/model is of other gates or another density and is kept\. To fix"
    with pytest.raises(FileExistsError, match=message):
        export_family([yaml], OVERRIDES, DENSITIES, plan, pruned)
    marker.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.l0_module=null", r"model\.l0_module is null: there are no gates to cut"),
        ("dry_run=true", r"dry_run=true prints the plan of a training, and a family is several"),
        ("export={languages: [en], vocabulary_size: 3}", r"vocabulary_size 3 is below the \d+ tok"),
    ],
)
def test_configurations_without_a_family(override, message, tiny_yaml, sts_csv, tmp_path):
    plan = EvaluationPlan([str(sts_csv)])
    with pytest.raises(ValueError, match=message):
        export_family([str(tiny_yaml)], [*OVERRIDES, override], DENSITIES, plan)
    assert not (tmp_path / "runs").exists()


def test_what_is_trained_on_judges_no_family(tiny_yaml, sts_csv, tmp_path):
    plan, overrides = EvaluationPlan([str(sts_csv)]), [*OVERRIDES, "data.on_trained_eval=error"]
    with pytest.raises(
        ConfigError, match="tiny: 40 of 40 pairs are trained on too, in train, such"
    ):
        export_family([str(tiny_yaml)], overrides, DENSITIES, plan)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("densities", "message"),
    [
        ([0.5, 0.5], r"densities \[0\.5, 0\.5\] are not different numbers in \(0, 1\)"),
        ([1.5], r"densities \[1\.5\] are not different numbers in \(0, 1\)\. To fix"),
        ([float("nan")], r"are not different numbers in \(0, 1\)\. To fix"),
        ([], r"are not different numbers in \(0, 1\)\. To fix"),
        ([0.75, 0.5, 0.3], r"no exportable shapes with 75\.0%, 50\.0%, 30\.0% of the encoder"),
    ],
)
def test_densities_without_nested_shapes_are_refused_before_the_training(
    densities, message, tiny_yaml, sts_csv, tmp_path
):
    plan = EvaluationPlan([str(sts_csv)])
    with pytest.raises(ValueError, match=message):
        export_family([str(tiny_yaml)], OVERRIDES, densities, plan)
    assert not (tmp_path / "runs").exists()


def test_a_run_without_gates(finished, sizes):
    run = finished[0] / "runs" / "tiny-75pct-recovery"
    with pytest.raises(ValueError, match=r"is a run without gates\. To fix, name a pruning run"):
        choose_members(run, DENSITIES)


@pytest.mark.slow
def test_goes_on_after_all_that_was_trained(finished, sizes, pruned, sts_csv):
    """A call that died after a recovery, before its model was written: only that is made again."""
    folder, results = finished[0], sizes[-1]
    weights = [size / "model" / "model.safetensors" for size in sizes]
    record = read_json(results / "model" / MARKER)
    content, time = weights[-1].read_bytes(), weights[0].stat().st_mtime_ns
    shutil.rmtree(results / "model")
    plan = EvaluationPlan([str(sts_csv)])
    again = [*OVERRIDES, "autoresume=true"]
    assert export_family([str(folder / "tiny.yaml")], again, DENSITIES, plan) == sizes
    assert read_json(results / "model" / MARKER) == record
    assert weights[-1].read_bytes() == content
    assert weights[0].stat().st_mtime_ns == time
    assert "Quality: not measured" not in (results / "model" / "README.md").read_text()


@pytest.mark.parametrize("gone", ["report.md", "model/evaluation.json"])
def test_a_size_that_was_evaluated_but_not_reported(gone, finished, sizes, pruned, sts_csv):
    """Killed between the evaluation, the card and the report."""
    results = sizes[-1]
    card = (results / "model" / "README.md").read_text()
    names = ["report.md", "pruning.json", "model/evaluation.json", "model/README.md"]
    for name in names[names.index(gone) :]:
        (results / name).unlink()
    yaml, plan = str(finished[0] / "tiny.yaml"), EvaluationPlan([str(sts_csv)])
    export_family([yaml], OVERRIDES, DENSITIES, plan, pruned)
    assert all((results / name).is_file() for name in names)
    assert (results / "model" / "README.md").read_text() == card
