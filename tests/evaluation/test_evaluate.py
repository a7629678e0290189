"""A model beside its baseline and its floors; the script around it."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from huggingface_hub import constants

from bge_pruning.evaluation import evaluate as module
from bge_pruning.evaluation import text_encoder
from bge_pruning.evaluation.evaluate import describe_task, evaluate
from bge_pruning.evaluation.scoring import Score, metric_names
from bge_pruning.evaluation.search import MODES
from bge_pruning.evaluation.tasks import SIMILARITY, beir_task, sts_task

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_model.py"


@pytest.fixture(scope="module")
def tasks(sts_csv, collection, tmp_path_factory):
    file = tmp_path_factory.mktemp("sts") / "pairs.csv"
    file.write_text(sts_csv.read_text())
    return [sts_task(file), beir_task(collection)]


@pytest.fixture(scope="module")
def result(model_folder, small_folder, tasks):
    """As it is written."""
    also = {"before recovery": str(small_folder), "same": str(model_folder)}
    options = {"also": also, "device": "cpu", "batch_size": 8}
    return evaluate(str(small_folder), str(model_folder), tasks, list(MODES), **options).as_dict()


def test_every_task_mode_and_metric_has_an_entry(result, tasks):
    found = [(e["task"], e["kind"], e["mode"], e["metric"], e["main"]) for e in result["tasks"]]
    assert found == [
        (task.name, task.kind, mode, metric, index == 0)
        for task in tasks
        for mode in MODES
        for index, metric in enumerate(metric_names(task.kind, mode))
    ]


def test_entries_are_consistent(result):
    for entry in result["tasks"]:
        assert set(entry["floors"]) == {"random_weights", "word_embeddings"}
        assert entry["floor"] == max(entry["floors"].values())
        expected = {"before recovery": entry["value"], "same": entry["baseline"]}
        assert entry["also"] == pytest.approx(expected, abs=1e-6)
        if entry["baseline"] > 0:
            assert entry["retention"] == pytest.approx(entry["value"] / entry["baseline"])
        assert ("interval" in entry) == ("p_value" in entry) == entry["main"]
        if entry["main"]:
            low, high = entry["interval"]
            assert low - 1e-4 <= entry["value"] <= high + 1e-4
            assert 0 < entry["p_value"] <= 1
        assert entry["samples"] == (40 if entry["kind"] == SIMILARITY else 15)
        assert (entry["truncated"], entry["seconds"] > 0) == (0, True)


def test_the_rest_of_the_result(result, model_folder, small_folder):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["model"], result["baseline"]) == (str(small_folder), str(model_folder))
    model, baseline = result["parameters"]["model"], result["parameters"]["baseline"]
    assert 2 * model["encoder"] == baseline["encoder"]
    assert model["heads"] == baseline["heads"] == 32 * 32 + 32 + 32 + 1
    sizes = result["size_bytes"]
    gone = 4 * (baseline["encoder"] - model["encoder"])
    assert sizes["baseline"] - sizes["model"] == pytest.approx(gone, rel=0.05)
    memory = result["speed"]["memory_bytes"]
    for which, counts in (("model", model), ("baseline", baseline)):
        assert memory[which]["weights"] == 4 * counts["total"]
        assert memory[which]["activations"] > 0
    assert memory["texts"] == 8
    assert result["speed"]["throughput_texts_per_s"]["ratio"] > 0
    assert {"python", "torch", "mteb"} <= set(result["versions"])
    assert (result["seed"], result["max_length"]) == (0, None)


@pytest.fixture(scope="module")
def alone(small_folder, tasks):
    """The model without a baseline."""
    return evaluate(str(small_folder), None, tasks[:1], device="cpu", max_length=8, seed=1)


def test_without_a_baseline(alone):
    result = alone.as_dict()
    for entry in result["tasks"]:
        assert entry["baseline"] is entry["retention"] is entry["retention_above_floor"] is None
        assert not {"p_value", "also"} & set(entry)
    assert result["speed"] is result["parameters"]["baseline"] is None
    assert result["max_length"] == 8


@pytest.mark.parametrize(
    ("baseline", "retention", "above"), [(0.8, 0.75, 0.5), (0.4, 1.5, None), (0.0, None, None)]
)
def test_retention(baseline, retention, above, tasks):
    values = {"model": 0.6, "baseline": baseline, "random_weights": 0.4, "word_embeddings": 0.1}
    scores = {
        name: {("tiny", "dense"): Score({"ndcg_at_10": v, "mrr_at_10": v}, np.arange(4.0), 9, 2, 1)}
        for name, v in values.items()
    }
    entries = describe_task(tasks[1], "dense", scores, {"other": {}}, np.arange(4.0), 0)
    first, second = (entry.as_dict() for entry in entries)
    for entry in (first, second):
        assert entry["floor"] == 0.4
        assert entry["retention"] == (None if retention is None else pytest.approx(retention))
        assert entry["retention_above_floor"] == (None if above is None else pytest.approx(above))
        assert entry["also"] == {"other": None}
        assert (entry["samples"], entry["texts"], entry["truncated"]) == (4, 9, 2)
    assert (first["metric"], first["main"], second["main"]) == ("ndcg_at_10", True, False)


def test_what_makes_the_floors(result, alone, model_folder, small_folder, tasks):
    """The pruned shape and the seed make the random one, the baseline's words the other."""
    own = evaluate(str(model_folder), None, tasks[:1], device="cpu").tasks[0].floors
    floors = result["tasks"][0]["floors"]
    assert floors["word_embeddings"] == pytest.approx(own["word_embeddings"])
    assert floors["random_weights"] != own["random_weights"]
    options = {"device": "cpu", "max_length": 8}
    found = [evaluate(str(small_folder), None, tasks[:1], seed=seed, **options) for seed in (1, 2)]
    assert [each.seed for each in found] == [1, 2]
    again, other = (each.tasks[0].floors for each in found)
    assert alone.tasks[0].floors == again
    assert again["random_weights"] != other["random_weights"]
    assert again["word_embeddings"] == other["word_embeddings"]


def test_limits_hold_for_every_model(small_folder, model_folder, tasks, monkeypatch):
    seen = []

    def spy(encoder, *arguments, **options):
        # Of 6 tokens 4 are words: the fifth does not count, the fourth does.
        fifth = encoder.encode(["dog " * 4 + last for last in ("cat", "man")]).dense_vecs
        fourth = encoder.encode(["dog " * 3 + last for last in ("cat", "man")]).dense_vecs
        seen.append((np.allclose(*fifth, atol=1e-6), np.allclose(*fourth, atol=1e-4)))
        return {("pairs", "dense"): Score({"cosine_spearman": 0.5}, np.arange(40.0), 1, 0, 1.0)}

    monkeypatch.setattr(module, "score_tasks", spy)
    options = {"max_length": 6, "batch_size": 7, "device": "cpu", "speed": False}
    also = {"whole": str(model_folder)}
    evaluate(str(small_folder), str(model_folder), tasks[:1], also=also, **options)
    assert seen == [(True, False)] * 5


def test_a_rival_without_heads_is_compared_by_dense_vectors(electra_folder, model_folder, tasks):
    modes = ["dense", "sparse"]
    result = evaluate(
        str(model_folder), str(electra_folder), tasks, modes, device="cpu", speed=False
    )
    for entry in result.tasks:
        assert (entry.baseline is None) == (entry.mode == "sparse")
    with pytest.raises(ValueError, match="mode sparse needs sparse vectors, and .* has no head"):
        evaluate(str(electra_folder), None, tasks, modes, device="cpu")


def test_a_further_model_that_cannot_be_loaded_is_refused_before_any_is_scored(
    electra_folder, model_folder, tasks, monkeypatch
):
    monkeypatch.setattr(module, "score_tasks", Mock(side_effect=AssertionError("scored")))
    folder, also = str(model_folder), {"rival": str(electra_folder)}
    with pytest.raises(ValueError, match="precision is bf16, but .* another library. To fix, use"):
        evaluate(folder, None, tasks, also=also, device="cpu", precision="bf16")


def test_every_task_and_phase_is_said(small_folder, tasks, monkeypatch, messages):
    monkeypatch.setattr(text_encoder, "QUIET", -1.0)
    monkeypatch.setattr(module, "measure_cost", Mock(return_value=None))
    with messages.at_level("INFO"):
        evaluate(str(small_folder), str(small_folder), tasks, device="cpu")
    ours = [r.getMessage() for r in messages.records if r.name.startswith("bge_pruning.")]
    said = [line for line in ours if not line.startswith("embedded ")]
    names = [task.name for task in tasks]
    models = ("the model", "the baseline", "the words alone", "random weights")
    assert said == [
        f"loading {small_folder}",
        *(
            f"evaluating {model} on {name} (task {number} of {len(names)})"
            for model in models
            for number, name in enumerate(names, 1)
        ),
        "computing intervals and paired tests",
        "measuring speed and memory, the model and the baseline in turns",
    ]
    assert any(re.fullmatch(r"embedded (\d+) of \1 texts", line) for line in ours)


def test_prompts_that_are_given_are_those_of_all_models(small_folder, tasks, monkeypatch):
    seen = []
    score = module.score_tasks

    def keep(encoder, *arguments):
        seen.append(encoder.prompts.get("given"))
        return score(encoder, *arguments)

    monkeypatch.setattr(module, "score_tasks", keep)
    given = {"query": "find: "}
    folder = str(small_folder)
    options = {"device": "cpu", "speed": False, "also": {"x": folder}, "prompts": given}
    evaluate(folder, folder, tasks[1:], **options)
    assert seen == [given, given, None, given, given]  # words have no prompts


def test_speed_is_measured_on_queries_if_there_are_no_sentences(small_folder, tasks, monkeypatch):
    measure = Mock(return_value=None)
    monkeypatch.setattr(module, "measure_cost", measure)
    options = {"device": "cpu", "prompts": {"query": "find: "}}
    evaluate(str(small_folder), str(small_folder), tasks[1:], **options)
    queries = {f"find: {query}" for query in tasks[1].queries()}
    assert sorted(measure.call_args.args[2]) == sorted(queries)


def test_arguments_that_make_no_sense(small_folder, tasks, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no task to evaluate on. To fix, give at least one"):
        evaluate(str(small_folder), None, [])
    with pytest.raises(ValueError, match="mode 'best' is not one of dense, sparse"):
        evaluate(str(small_folder), None, tasks, ["best"], device="cpu")
    with pytest.raises(FileNotFoundError, match="none is not a folder"):
        evaluate(str(small_folder), None, tasks, also={"x": str(tmp_path / "none")})
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match=f"seed {seed} is not in .* To fix, use 0"):
            evaluate(str(small_folder), None, tasks, seed=seed)
    for device in ("bananas", "meta"):
        message = rf"device {device} cannot be used here \(.*To fix, use"
        with pytest.raises(ValueError, match=message):
            evaluate(str(small_folder), None, tasks, device=device)
    refuse = Mock(side_effect=AssertionError("Torch not compiled with CUDA enabled"))
    monkeypatch.setattr("torch.zeros", refuse)
    with pytest.raises(ValueError, match=r"device cuda cannot be used here \(Torch not compiled"):
        evaluate(str(small_folder), None, tasks, device="cuda")


def test_models_on_the_hub_are_fetched_first(small_folder, tasks, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "load_encoder", lambda *_: pytest.fail("was loaded"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(OSError, match="'no/model' is not in the local cache and the hub did not"):
        evaluate(str(small_folder), None, tasks, device="cpu", also={"x": "no/model"})


def test_a_baseline_that_is_worse_by_chance_has_a_large_p_value(tasks):
    generator = np.random.default_rng(0)
    gold = np.array(tasks[0].pairs()[2])
    samples = [gold + generator.normal(0, 1, 40) for _ in range(2)]
    names = ("model", "baseline", "random_weights", "word_embeddings")
    scores = {
        name: {("pairs", "dense"): Score({"cosine_spearman": 0.5}, sample, 1, 0, 1.0)}
        for name, sample in zip(names, samples * 2, strict=True)
    }
    (entry,) = describe_task(tasks[0], "dense", scores, {}, np.zeros(2), 0)
    assert entry.p_value > 0.05


def test_what_is_imported_and_when():
    """Nothing heavy for --help; ONNX only when it is used."""
    code = (
        "import runpy, sys, time; sys.argv = ['x', '--help']; start = time.perf_counter()\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert time.perf_counter() - start < 10\n"  # 0.2 s when the machine is idle
        "assert not {'torch', 'sentence_transformers', 'matplotlib', 'mteb'} & set(sys.modules)\n"
        "import bge_pruning.evaluation.evaluate, bge_pruning.export.onnx_export\n"
        "assert not {'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    options = {"cwd": SCRIPT.parents[1], "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    assert "--baseline" in done.stdout


def test_script_writes_what_evaluate_returns(
    model_folder, small_folder, sts_csv, collection, tmp_path, capsys
):
    file, output = tmp_path / "six.csv", tmp_path / "out" / "results.json"
    file.write_text(sts_csv.read_text())
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = [str(small_folder), "--baseline", str(model_folder), "--sts", str(file)]
    arguments += ["--retrieval", str(collection), "--modes", "dense", "all", "dense"]
    arguments += ["--also", f"whole={model_folder}", "--device", "cpu", "--no-speed"]
    arguments += ["--output", str(output), "--max-length", "7", "--seed", "3"]
    assert main(arguments) == 0
    written = json.loads(output.read_text())
    mains = [entry for entry in written["tasks"] if entry["main"]]
    assert [(e["task"], e["mode"]) for e in mains] == [
        (task, mode) for task in ("six", "tiny") for mode in ("dense", "all")
    ]
    assert all(entry["also"]["whole"] == entry["baseline"] for entry in mains)
    assert (written["speed"], written["max_length"], written["seed"]) == (None, 7, 3)
    assert written["command"].startswith("python scripts/evaluate_model.py ")
    said, table = capsys.readouterr().out, output.with_suffix(".md").read_text()
    for entry in mains:
        assert f"{entry['value']:.4f}" in said
        assert f"| {entry['task']} | {entry['mode']} |" in table
        assert f"{entry['truncated']:,} of {entry['texts']:,} texts are longer" in said
    before = output.read_bytes()
    assert main(arguments) == 1
    assert "exists. To fix" in capsys.readouterr().err
    output.unlink()
    assert main(arguments) == 1  # the table alone is kept too
    assert not output.exists()
    assert main([*arguments, "--overwrite"]) == 0
    assert output.read_bytes() != before  # the seconds differ
    assert output.with_suffix(".md").read_text() == table


def test_script_refuses_wrong_names(small_folder, sts_csv, tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = [str(small_folder), "--output", str(tmp_path / "x.json"), "--device", "cpu"]
    for names in (("x", "x"), ("model",), ("original",), ("baseline",)):
        also = [word for name in names for word in ("--also", f"{name}={small_folder}")]
        with pytest.raises(SystemExit):
            main([*arguments, "--sts", str(sts_csv), *also])
        assert f"two models would be called {names[0]}; choose" in capsys.readouterr().err
    for words in (["--sts", str(sts_csv), str(sts_csv)], ["--sts", str(sts_csv)] * 2):
        assert main([*arguments, *words]) == 1  # the first of two --sts is not forgotten
        assert "two tasks are called tiny" in capsys.readouterr().err
    markdown = [str(small_folder), "--sts", str(sts_csv), "--output", str(tmp_path / "x.md")]
    assert main(markdown) == 1
    assert "x.md is to hold JSON, and its table" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
