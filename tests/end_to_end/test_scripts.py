"""The command lines: exit codes, one clear line for a failure, and what lies there afterwards."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from bge_pruning.model_io import bert_conversion as conversion_folder
from bge_pruning.model_io import minilm
from bge_pruning.reports import console
from bge_pruning.workflows import pipeline
from tests.common.script_process import load_script, new_process

FOLDER = Path(__file__).parents[2] / "scripts"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
# By script: arguments with something wrong in them, the exit code, and what is said.
FAILURES = {
    "benchmark_efficiency": (["none"], 1, r"model none is no folder\. To fix, give a model's"),
    "benchmark_training": (
        ["none", "--texts", "none.txt"],
        1,
        r"none\.txt: no such file\. To fix, check",
    ),
    "check_index_compatibility": (
        ["none", "none", "--texts", "none.txt"],
        1,
        r"model none is no folder\. To fix, give a model's folder",
    ),
    "choose_shape": (["none.yaml"], 2, r"none\.yaml: no such file\. To fix, check the path"),
    "compare_runs": (
        ["none", "--output", "out"],
        1,
        r"none: no such file\. To fix, give a results folder or the output",
    ),
    "cut_baseline": (["none.yaml"], 2, r"none\.yaml: no such file\. To fix, check the path"),
    "evaluate_model": (
        ["none", "--sts", "none.csv", "--output", "o.json"],
        1,
        r"none\.csv: no such file\. To fix, check the path",
    ),
    "extract_pruned_model": (
        ["none", "out"],
        1,
        r"none: no such run folder or checkpoint\. To fix, check the path",
    ),
    "export_family": (
        ["none.yaml", "--sts", "none.csv"],
        2,
        r"none\.yaml: no such file\. To fix, check the path",
    ),
    "prepare_minilm": (
        ["--sentences", "none.csv"],
        1,
        r"none\.csv not found, expected a CSV .* name a file with --sentences",
    ),
    "quickstart": (
        ["seedd=1"],
        2,
        r"override 'seedd=1': unknown key 'seedd': did you mean 'seed'\?",
    ),
    "run_pipeline": (
        ["none.yaml", "--sts", "none.csv"],
        2,
        r"none\.yaml: no such file\. To fix, check the path",
    ),
    "run_quality_study": (["none.yaml"], 2, r"none\.yaml: no such file\. To fix, check the path"),
    "train_pruning": (["none.yaml"], 2, r"none\.yaml: no such file\. To fix, check the path"),
    "write_model_card": (
        ["none"],
        1,
        r"none: holds no pruning\.json, so it is not an extracted model and its README\.md",
    ),
    "write_report": (
        ["none"],
        1,
        r"none holds neither evaluation\.json nor pruning\.json nor metrics\.jsonl\. To fix",
    ),
}
USAGE = {
    "benchmark_efficiency": [
        [],
        ["m", "--batch-sizes", "0"],
        ["m", "--dtype", "int8"],
        ["m", "--runtimes", "tf"],
    ],
    "benchmark_training": [
        ["m"],
        ["m", "--texts", "t.txt", "--steps", "0"],
        ["m", "--texts", "t.txt", "--trainings", "none"],
    ],
    "check_index_compatibility": [
        ["a", "b"],
        ["a", "--texts", "t.txt"],
        ["a", "b", "--texts", "t.txt", "--max-length", "0"],
    ],
    "choose_shape": [[], ["a.yaml", "--fast"]],
    "compare_runs": [["a"], ["--output", "o"]],
    "cut_baseline": [[], ["a.yaml", "--fast"]],
    "evaluate_model": [
        ["m", "--output", "o.json"],
        ["m", "--sts", "a.csv"],
        ["m", "--output", "o.json", "--modes", "dense"],
        ["m", "--sts", "a.csv", "--output", "o.json", "--batch-size", "many"],
        ["m", "--sts", "a.csv", "--output", "o.json", "--also", "=folder"],
        ["m", "--sts", "a.csv", "--output", "o.json", "--also", "name="],
    ],
    "export_family": [["a.yaml"], ["--sts", "a.csv"], ["a.yaml", "--sts", "a", "--densities", "x"]],
    "extract_pruned_model": [
        ["run"],
        ["run", "out", "surplus"],
        ["run", "out", "--dtype", "int4"],
        ["run", "out", "--colbert-dim", "64"],
        ["run", "out", "--fit-texts", "a.txt"],
        ["run", "out", "--int8-sts", "a.csv"],
        ["run", "out", "--vocabulary-size", "5"],
        ["run", "out", "--languages", "de", "--vocabulary-size", "0"],
        ["run", "out", "--report-on", "a.txt"],
        ["run", "out", "--languages", " , "],
        ["run", "out", "--languages", ""],
        ["run", "out", "--private"],
    ],
    "prepare_minilm": [["surplus"]],
    "quickstart": [["--fast"]],
    "run_pipeline": [["a.yaml"], ["--sts", "a.csv"], ["a.yaml", "--sts"]],
    "run_quality_study": [[], ["a.yaml", "b.yaml"], ["a.yaml", "--only"], ["a.yaml", "--fast"]],
    "train_pruning": [[], ["--fast"]],
    "write_model_card": [[], ["m", "surplus"], ["m", "--private"], ["m", "--evaluation"]],
    "write_report": [[], ["a", "b"]],
}


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    """Where the scripts run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # prepare_minilm would set it


@pytest.fixture
def run(capsys):
    """A function from a script and its arguments to exit code, output and errors."""

    def run(script: str | ModuleType, *arguments: object) -> tuple[int, str, str]:
        module = load_script(script) if isinstance(script, str) else script
        with new_process():
            code = module.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def assert_fails(result: tuple[int, str, str], code: int, message: str) -> None:
    """Nothing on stdout, and after the log one line that says what is wrong."""
    got, out, err = result
    assert (got, out) == (code, ""), err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert re.match("error: " + message, last), last
    assert err.count("error: ") == 1


def write_pairs(path: Path, *rows: str) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


# All of them


def test_every_script_is_tested_here():
    assert SCRIPTS == sorted(FAILURES) == sorted(USAGE)


@pytest.fixture
def nothing_to_prepare(monkeypatch):
    """The small real model is there already, as far as ``quickstart`` can tell."""
    calls = []
    monkeypatch.setattr(minilm, "prepare", lambda *paths: calls.append(paths))
    return calls


@pytest.fixture(params=SCRIPTS)
def failing(request, tmp_path) -> tuple[str, list[str], int, str]:
    """A script, and its entry of FAILURES."""
    if request.param == "quickstart":
        request.getfixturevalue("nothing_to_prepare")
        for folder in ("configs", "data"):
            (tmp_path / folder).symlink_to(FOLDER.parent / folder)
    return request.param, *FAILURES[request.param]


def test_failure_is_one_line_and_a_code(failing, run, tmp_path):
    name, arguments, code, message = failing
    before = set(tmp_path.rglob("*"))
    assert_fails(run(name, *arguments), code, message)
    assert set(tmp_path.rglob("*")) == before


def test_code_reaches_the_shell(failing, monkeypatch):
    name, arguments, code, _ = failing
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as stop, new_process():
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert stop.value.code == code


@pytest.mark.parametrize(
    ("name", "arguments"), [(name, words) for name in USAGE for words in USAGE[name]]
)
def test_wrong_usage_is_code_2(name, arguments, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        load_script(name).main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_starts_with_the_first_line_of_the_script(name, capsys):
    with pytest.raises(SystemExit) as stop:
        load_script(name).main(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


HELP = """\
import runpy, sys
from contextlib import redirect_stdout, suppress
from io import StringIO

for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with suppress(SystemExit), redirect_stdout(StringIO()):
        runpy.run_path(path, run_name="__main__")
print(sorted({"torch", "transformers", "composer", "datasets", "mteb", "numpy"} & set(sys.modules)))
"""


def test_help_loads_nothing_heavy():
    """So it is there in a moment, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, *map(str, sorted(FOLDER.glob("*.py")))],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("words", [["-m", "bge_pruning.train"], ["scripts/run_pipeline.py"]])
def test_help_is_quick(words):
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *words, "--help"], cwd=FOLDER.parent, capture_output=True, check=True
    )
    assert time.perf_counter() - started < 2.0


# train_pruning


def test_training_leaves_a_checkpoint(run, tiny_yaml, tmp_path):
    code, out, err = run("train_pruning", tiny_yaml, "max_duration=2ba")
    assert (code, out) == (0, "")
    assert "step 2 | " in err
    assert (tmp_path / "runs" / "tiny" / "latest-rank0.pt").is_file()
    again = run("train_pruning", tiny_yaml, "max_duration=2ba")
    assert_fails(again, 1, ".*tiny is in use and is kept. To fix, set another run_name")
    code, _, err = run("train_pruning", tiny_yaml, "max_duration=1ba", "overwrite=true")
    assert code == 0, err
    assert not (tmp_path / "runs" / "tiny" / "ba2-rank0.pt").exists()


def test_dry_run_prints_the_plan_and_makes_nothing(run, tiny_yaml, tmp_path):
    before = set(tmp_path.rglob("*"))
    code, out, err = run("train_pruning", tiny_yaml, "dry_run=true")
    assert (code, err) == (0, "")
    assert "target       3 layers, hidden 24, 3 heads, intermediate 48" in out
    assert set(tmp_path.rglob("*")) == before


def test_training_without_a_model(run, tiny_yaml):
    assert_fails(run("train_pruning", tiny_yaml, "model.base_model=./none"), 1, ".*none.*To fix")


# extract_pruned_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_tiny) -> Path:
    """The folder of a run of one step."""
    return train_tiny(tmp_path_factory.mktemp("trained"), "max_duration=1ba")


def test_extraction(run, trained, tmp_path):
    code, out, err = run("extract_pruned_model", trained, "new/small")
    assert (code, out) == (0, ""), err
    assert "wrote new/small: 3 layers, hidden 24, 3 heads, intermediate 48;" in err
    config = json.loads((tmp_path / "new" / "small" / "config.json").read_text(encoding="utf-8"))
    assert (config["hidden_size"], config["num_hidden_layers"]) == (24, 3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["small"]


def test_extraction_of_the_best_checkpoint(run, train_tiny, tmp_path, monkeypatch):
    from bge_pruning.callbacks import evaluation_callback

    scores = {1: 0.5, 2: 0.7, 3: 0.6}
    key = "dev/cosine_spearman"
    monkeypatch.setattr(
        evaluation_callback, "_similarity", lambda s: {key: scores[s.timestamp.batch.value]}
    )
    steps = ("max_duration=3ba", "eval_interval=1ba")
    folder = train_tiny(tmp_path / "train", *steps, f"evaluation.keep_best={key}")
    for name, arguments in {
        "newest": (folder,),
        "best": (folder, "--best"),
        "file": (folder / "best-rank0.pt",),
    }.items():
        assert run("extract_pruned_model", *arguments, name)[0] == 0
        info = json.loads((tmp_path / name / "pruning.json").read_text())
        assert info["batches"] == {"prune": 3 if name == "newest" else 2}


def test_extraction_of_a_best_checkpoint_that_is_not_there(run, trained, tmp_path):
    result = run("extract_pruned_model", trained, "small", "--best")
    assert_fails(result, 1, r".*tiny: holds no best-rank0\.pt\. To fix, name the folder of a run")
    assert list(tmp_path.iterdir()) == []


def test_extraction_keeps_a_model_unless_told_to_overwrite(run, trained, tmp_path):
    assert run("extract_pruned_model", trained, "small")[0] == 0
    note = tmp_path / "small" / "note.txt"
    note.touch()
    message = r"small exists and is kept\. To fix, choose another folder, or pass --overwrite"
    assert_fails(run("extract_pruned_model", trained, "small"), 1, message)
    assert note.exists()
    assert run("extract_pruned_model", trained, "small", "--overwrite")[0] == 0
    assert not note.exists()


def test_extraction_never_replaces_somebody_elses_folder(run, trained, tmp_path):
    mine = tmp_path / "thesis" / "chapter1.txt"
    mine.parent.mkdir()
    mine.write_text("ten years of work")
    result = run("extract_pruned_model", trained, "thesis", "--overwrite")
    assert_fails(result, 1, r"thesis holds no pruning\.json")
    assert mine.read_text() == "ten years of work"


@pytest.mark.parametrize("size", [0, 1000, -1000])
def test_extraction_of_a_truncated_checkpoint(size, run, trained, tmp_path):
    content = (trained / "latest-rank0.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:size])
    result = run("extract_pruned_model", "cut.pt", "small")
    assert_fails(result, 1, r"cut\.pt: damaged, not complete, or not a checkpoint .*To fix")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.pt"]


def test_extraction_of_a_run_without_a_checkpoint(run, tmp_path):
    (tmp_path / "run").mkdir()
    result = run("extract_pruned_model", "run", "small")
    assert_fails(result, 1, r"run: holds no latest-rank0\.pt, so no checkpoint was saved\. To fix")


def test_extraction_with_everything(run, trained, tmp_path):
    (tmp_path / "texts.txt").write_text("the man plays a flute\nthe dog\n" * 2)
    pairs = write_pairs(tmp_path / "pairs.csv", "the man,a dog,1", "the man,the man,5", "a,dog,2")
    code, out, err = run(
        *("extract_pruned_model", trained, "small", "--dtype", "bf16", "--colbert-dim", "hidden"),
        *("--keep-dimension", "--onnx", "--onnx-int8", "--int8-sts", pairs),
        *("--keep-vocabulary-from", "texts.txt", "--languages", "en, de", "--vocabulary-size", 20),
        *("--report-on", "texts.txt"),
    )
    assert (code, out) == (0, ""), err
    info = json.loads((tmp_path / "small" / "pruning.json").read_text())
    assert info["precision"]["dtype"] == "bfloat16"
    assert info["multi_vector"]["colbert_dim"] == 24
    assert info["projection"]["dimensions"] == 32
    assert info["vocabulary"]["vocabulary"]["kept"] <= 20
    corpora = [Path(row["corpus"]).name for row in info["vocabulary"]["coverage"]]
    chosen = ["texts.txt", "newstest2019-en.txt.gz", "newstest2019-de.txt.gz"]
    assert corpora[:3] == chosen
    assert info["onnx_int8"]["spearman"]["pairs"] == 3
    assert (tmp_path / "small" / "onnx" / "model_quantized.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--languages", "xx"], r"no corpus of xx is shipped, only of ar, de, en"),
        (["--keep-vocabulary-from", "gone.txt"], r"gone\.txt: no such file\. To fix"),
        (["--keep-dimension", "--fit-texts", "gone.txt"], r"gone\.txt: no such file\. To fix"),
        (["--onnx-int8", "--int8-sts", "gone.csv"], r"gone\.csv: no such file\. To fix"),
        (["--push-to-hub", "nobody"], r".*'nobody'.*owner/name"),
    ],
)
def test_options_that_cannot_be_met_are_said_first(arguments, message, run, trained, tmp_path):
    assert_fails(run("extract_pruned_model", trained, "small", *arguments), 1, message)
    assert list(tmp_path.iterdir()) == []


def test_extraction_and_upload(run, trained, tmp_path, monkeypatch):
    from bge_pruning.export import hub_upload

    calls = []
    monkeypatch.setattr(hub_upload, "check_hub_access", lambda name: calls.append(name))

    def push(folder: Path, name: str, private: bool) -> str:
        assert (folder / "pruning.json").is_file()
        calls.append((name, private))
        return f"https://somewhere/{name}"

    monkeypatch.setattr(hub_upload, "push_to_hub", push)
    arguments = ("--push-to-hub", "me/small", "--private")
    code, out, _ = run("extract_pruned_model", trained, "small", *arguments)
    assert (code, out) == (0, "uploaded to https://somewhere/me/small\n")
    assert calls == ["me/small", ("me/small", True)]


# export_family


def test_a_family(run, tiny_yaml, sts_csv, tmp_path):
    code, out, err = run(
        *("export_family", tiny_yaml, "recovery.max_duration=1ba", "--densities", 0.5),
        *("--sts", sts_csv),
    )
    assert code == 0, err
    assert re.search(r"^ *50pct ", out, re.MULTILINE), out
    folder = tmp_path / "results" / "tiny-family" / "50pct"
    assert (folder / "model" / "README.md").is_file()
    assert out.splitlines()[-1] == f"models   {folder}/model"


# write_model_card


def test_card_and_upload(run, trained, monkeypatch):
    from bge_pruning.export import hub_upload

    assert run("extract_pruned_model", trained, "small")[0] == 0
    calls = []
    monkeypatch.setattr(hub_upload, "check_hub_access", lambda *a: calls.append(a))
    monkeypatch.setattr(hub_upload, "push_to_hub", lambda *a: calls.append(a) or "https://hub/x")
    code, out, err = run("write_model_card", "small")
    assert (code, out, calls) == (0, "wrote small/README.md\n", []), err
    code, out, _ = run("write_model_card", "small", "--push-to-hub", "me/x", "--private")
    assert (code, out) == (0, "wrote small/README.md\nuploaded to https://hub/x\n")
    assert calls == [("me/x",), (Path("small"), "me/x", True)]


def test_an_upload_that_cannot_work_is_noticed_first(run, trained, monkeypatch, tmp_path):
    import huggingface_hub

    assert run("extract_pruned_model", trained, "small")[0] == 0
    (tmp_path / "small" / "README.md").unlink()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    result = run("write_model_card", "small", "--push-to-hub", "me/x")
    assert_fails(result, 1, r"there is no token for the Hugging Face hub\. To fix, run 'hf auth")
    result = run("write_model_card", "small", "--push-to-hub", "x")
    assert_fails(result, 1, r"'x' cannot be the name of a model on the hub\. To fix, choose owner")
    assert not (tmp_path / "small" / "README.md").exists()


# evaluate_model


@pytest.fixture
def arguments(model_folder, sts_csv) -> list:
    """Of an evaluation that works and is quick."""
    common = ["--sts", sts_csv, "--device", "cpu", "--output", "out/result.json"]
    return [model_folder, "--baseline", model_folder, *common]


def test_evaluation(run, arguments, tmp_path):
    code, out, err = run("evaluate_model", *arguments, "--seed", 3, "--max-length", 9)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    task, _ = result["tasks"]
    assert (task["task"], task["retention"], result["seed"]) == ("tiny", 1, 3)
    assert result["command"].startswith("python scripts/evaluate_model.py /")
    assert result["command"].endswith("--output out/result.json --seed 3 --max-length 9")
    assert f"{task['value']:.4f}" in out and "one text: " in out


def test_an_existing_result_is_noticed_before_the_work(run, arguments, tmp_path, monkeypatch):
    script = load_script("evaluate_model")
    from bge_pruning.evaluation import evaluate as module

    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "result.json"
    output.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("evaluates"))
        result = run(script, *arguments)
    assert_fails(result, 1, r"out/result\.json exists\. To fix, .*pass --overwrite")
    assert output.read_text() == "mine"
    assert run(script, *arguments, "--no-speed", "--overwrite")[0] == 0
    assert json.loads(output.read_text())["speed"] is None


def test_a_failed_evaluation_leaves_the_earlier_result(run, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("mine")
    result = run("evaluate_model", "./none", *arguments[1:], "--overwrite")
    assert_fails(result, 1, r"model \./none is no folder\. To fix, give a model's folder, a run")
    assert (tmp_path / "out" / "result.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "holds no sentence pairs"),
        (("a,b,1", "a,b,n/a"), r"2: score 'n/a' is not a number in \[0, 5\]\. To fix, correct"),
        (("a,b,1", "a,b"), "2: has 2 columns, expected 3 as in the first line"),
        (("a,b,nan",), "1: score 'nan' is not a number"),
        (("a,a,2", "cat,dog,2"), "every gold score is 2"),
    ],
    ids=["empty", "no number", "short row", "nan", "all the same"],
)
def test_pairs_that_cannot_be_used(rows, message, run, arguments, tmp_path):
    arguments[arguments.index("--sts") + 1] = write_pairs(tmp_path / "bad.csv", *rows)
    assert_fails(run("evaluate_model", *arguments), 1, f".*bad.*{message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-length", 0, r"max_length 0 is not above 0\. To fix, use 1 or more"),
        ("--max-length", 2, "max_length 2 leaves no room for text beside 2 special tokens"),
        ("--batch-size", 0, r"batch_size 0 is not above 0\. To fix, use 1 or more"),
        ("--device", "abacus", ".*abacus"),
    ],
)
def test_options_out_of_range(option, value, message, run, arguments):
    assert_fails(run("evaluate_model", *arguments, option, value), 1, message)


@pytest.fixture
def damaged(model_folder, tmp_path) -> Path:
    """A copy of the model, to damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "damaged"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_model(name, run, arguments, damaged, tmp_path):
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    assert_fails(run("evaluate_model", damaged, *arguments[1:]), 1, ".*/damaged")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_weights_are_not_numbers(run, arguments, damaged):
    from safetensors.torch import load_file, save_file

    weights = load_file(damaged / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][3] = float("nan")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    message = r"dense_vecs of .*/damaged are not finite: its weights are broken\. To fix, use"
    assert_fails(run("evaluate_model", damaged, *arguments[1:]), 1, message)


# run_pipeline


def test_pipeline(run, tiny_yaml, sts_csv, tmp_path):
    command = ["run_pipeline", tiny_yaml, "max_duration=2ba", "--sts", sts_csv]
    code, out, err = run(*command)
    assert code == 0, err
    results = tmp_path / "results" / "tiny"
    task, _ = json.loads((results / "evaluation.json").read_text(encoding="utf-8"))["tasks"]
    assert re.search(rf"dense +{task['baseline']:.4f} .* {task['value']:.4f} ", out)
    assert (results / "report.md").is_file()
    assert_fails(run(*command), 1, ".*results/tiny holds results and is kept. To fix")


@pytest.mark.parametrize("key", ["model.l0_module=null", "autoresume=true"])
def test_pipeline_that_is_refused(key, run, tiny_yaml, sts_csv, tmp_path):
    assert_fails(run("run_pipeline", tiny_yaml, key, "--sts", sts_csv), 2, ".*To fix")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def recorded(monkeypatch):
    """What the pipeline is called with, instead of running it."""
    calls = []
    monkeypatch.setattr(pipeline, "run_pipeline", lambda *args: calls.append(args) or {})
    return calls


@pytest.mark.parametrize(
    "words",
    [
        "a.yaml b.yaml seed=1 x.y=2 --sts c.csv d.csv",
        "a.yaml seed=1 --sts c.csv d.csv -- b.yaml x.y=2",
    ],
)
def test_pipeline_arguments(words, run, recorded):
    """Nothing is printed where there is nothing: on all ranks but the first."""
    assert run("run_pipeline", *words.split()) == (0, "", "")
    plan = pipeline.EvaluationPlan(["c.csv", "d.csv"], [], "test", ["dense"])
    assert recorded == [(["a.yaml", "b.yaml"], ["seed=1", "x.y=2"], plan)]


def test_pipeline_is_interrupted(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_pipeline", interrupt)
    assert_fails(run("run_pipeline", "a.yaml", "--sts", "b.csv"), 130, "interrupted")


# quickstart


@pytest.fixture
def quickstart(tiny_yaml, sts_csv, nothing_to_prepare, monkeypatch) -> ModuleType:
    """The script, on the tiny model."""
    script = load_script("quickstart")
    monkeypatch.setattr(script, "CONFIG", str(tiny_yaml))
    monkeypatch.setattr(script, "STS", str(sts_csv))
    return script


def test_quickstart_files_are_in_the_repository():
    script = load_script("quickstart")
    assert all((FOLDER.parent / name).is_file() for name in (script.CONFIG, script.STS))
    text = (FOLDER.parent / script.CONFIG).read_text(encoding="utf-8")
    assert f"base_model: {minilm.DEFAULT_OUTPUT}\n" in text


def test_quickstart_prepares_prunes_and_says_where(
    run, quickstart, nothing_to_prepare, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run(quickstart, "max_duration=2ba", "run_name=q")
    assert code == 0, err
    assert nothing_to_prepare == [(minilm.DEFAULT_OUTPUT, minilm.DEFAULT_SENTENCES)]
    results = tmp_path / "results" / "q"
    assert (results / "model").is_dir() and (results / "report.md").is_file()
    assert "original" in out
    assert out.endswith(f"model    {results}/model\nreport   {results}/report.html\n")


@pytest.mark.parametrize("name", ["r" * 100, "v2 [half]"], ids=["long", "brackets"])
def test_quickstart_prints_paths_as_they_are(name, run, quickstart, recorded, monkeypatch):
    monkeypatch.setattr(console, "show_evaluation", lambda *_: None)
    code, out, err = run(quickstart, f"results_folder='{name}'")
    assert code == 0, err
    assert out == f"model    {name}/model\nreport   {name}/report.html\n"


def test_quickstart_checks_the_arguments_before_the_work(run, quickstart, nothing_to_prepare):
    assert_fails(run(quickstart, "seedd=1"), 2, "override 'seedd=1'")
    assert nothing_to_prepare == []


# prepare_minilm


def test_preparing_what_is_there(run, tmp_path):
    conversion_folder.write_record(tmp_path, {"source_sha256": minilm.SOURCE_SHA256})
    code, out, err = run("prepare_minilm", "--output", tmp_path)
    assert (code, out) == (0, "")
    assert err == f"{tmp_path} already holds {minilm.MODEL_NAME}; nothing to do\n"


def test_preparing_passes_its_arguments_on(run, monkeypatch):
    calls = []
    script = load_script("prepare_minilm")
    monkeypatch.setattr(script, "prepare", lambda *args: calls.append(args))
    assert run(script, "--output", "o", "--sentences", "s.csv", "--overwrite")[0] == 0
    assert run(script)[0] == 0
    assert calls == [
        (Path("o"), Path("s.csv"), True),
        (minilm.DEFAULT_OUTPUT, minilm.DEFAULT_SENTENCES, False),
    ]


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_preparing_keeps_somebody_elses_folder(options, run, sts_csv, tmp_path):
    mine = tmp_path / "thesis" / "chapter1.txt"
    mine.parent.mkdir()
    mine.write_text("ten years of work")
    result = run("prepare_minilm", "--output", "thesis", "--sentences", sts_csv, *options)
    assert_fails(result, 1, "thesis .*is kept.*To fix")
    assert mine.read_text() == "ten years of work"


def test_retrieval_in_every_mode_is_written_and_shown(run, model_folder, tmp_path):
    folder = tmp_path / "pets"
    (folder / "qrels").mkdir(parents=True)
    texts = ["a dog", "a cat", "the man plays", "a red book"]
    for name in ("corpus", "queries"):
        rows = [json.dumps({"_id": f"{name[0]}{i}", "text": t}) for i, t in enumerate(texts)]
        write_pairs(folder / f"{name}.jsonl", *rows)
    write_pairs(folder / "qrels" / "test.tsv", "q0\tc0\t1", "q1\tc1\t1")
    words = [model_folder, "--baseline", model_folder, "--retrieval", folder, "--output", "o.json"]
    modes = ["dense", "sparse", "colbert", "dense+sparse", "all"]
    code, out, err = run("evaluate_model", *words, "--modes", *modes)
    assert code == 0, err
    result = json.loads(Path("o.json").read_text())
    found = [t for t in result["tasks"] if t["metric"] == "ndcg_at_10"]
    assert [t["mode"] for t in found] == modes
    assert all(t["value"] == t["baseline"] == 1.0 for t in found)
    assert out.count("pets") == 1
    assert all(re.search(rf"^ *{re.escape(mode)} +1\.0000 ", out, re.M) for mode in modes)
    assert result["parameters"]["model"]["total"] > 0
    assert_fails(run("evaluate_model", *words), 1, r"o.json exists. To fix, .*--overwrite")


def test_a_mode_or_a_collection_that_is_wrong(run, model_folder):
    words = [model_folder, "--output", "o.json", "--retrieval"]
    result = run("evaluate_model", *words, "./none")
    assert_fails(result, 1, r"none/qrels/test.tsv: no such file. To fix, check the path")
    result = run("evaluate_model", *words, "none")
    message = "none: no such file or folder; as a name, mteb .* has no task 'none'.* To fix"
    assert_fails(result, 1, message)
    assert not Path("o.json").exists()


# benchmark_efficiency, benchmark_training


def test_efficiency_is_measured_and_written(run, model_folder, sts_csv, tmp_path):
    words = ["--baseline", model_folder, "--texts", sts_csv, "--lengths", "4", "--batch-sizes", "2"]
    words += ["--seconds", "0.01", "--output", "speed.json"]
    code, out, err = run("benchmark_efficiency", model_folder, *words)
    assert code == 0, err
    assert f"baseline: {model_folder}, 4 layers" in out
    assert "| runtime | texts | tokens | ms (p95) |" in out
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [setting["length"] for setting in found["settings"]] == [4, "real"]
    again = run("benchmark_efficiency", model_folder, *words)
    assert_fails(again, 1, r"speed\.json exists")
    assert run("benchmark_efficiency", model_folder, *words, "--overwrite")[0] == 0


def test_efficiency_of_a_configuration_in_two_runtimes(run, tiny_yaml, sts_csv):
    words = ["--texts", sts_csv, "--lengths", "4", "--batch-sizes", "2", "--seconds", "0.01"]
    code, out, err = run("benchmark_efficiency", tiny_yaml, *words, "--runtimes", "onnx", "torch")
    assert code == 0, err
    assert f"model:    {tiny_yaml} (target, random weights), 3 layers, hidden 24" in out
    assert f"baseline: {tiny_yaml} (source, random weights), 4 layers, hidden 32" in out
    rows = [
        line.split(" | ")[:3] for line in out.splitlines() if re.match(r"\| (torch|onnx)", line)
    ]
    assert [row[:2] for row in rows] == [["| torch", "2"]] * 2 + [["| onnx", "2"]] * 2
    assert [row[2] for row in rows[:2]] == [row[2] for row in rows[2:]]


def test_efficiency_that_cannot_be_measured(run, model_folder, tiny_yaml, tmp_path):
    words = ["benchmark_efficiency", model_folder, "--runtimes", "torch", "onnx"]
    message = (
        r"dtype bf16 is not for the runtime onnx: .* To fix, leave --dtype or that runtime out"
    )
    assert_fails(run(*words, "--dtype", "bf16"), 1, message)
    message = r"device tpu cannot be used here \(torch knows no such device\)\. To fix, use cpu"
    assert_fails(run(*words, "--device", "tpu"), 1, message)
    (tmp_path / "plain.yaml").write_text(f"extends: {tiny_yaml}\nmodel: {{l0_module: null}}\n")
    result = run("benchmark_efficiency", "plain.yaml")
    assert_fails(
        result, 2, r"plain\.yaml: prunes nothing .*To fix, name a configuration with a tar"
    )


def test_training_steps_are_measured_and_written(run, model_folder, sts_csv, tmp_path):
    words = ["--texts", sts_csv, "--batch-size", "4", "--steps", "2", "--fixed-length", "8"]
    code, out, err = run("benchmark_training", model_folder, *words, "--output", "steps.json")
    assert code == 0, err
    assert "| fixed length | gates |" in out
    assert err.startswith("fixed length: 2 steps of plain, gates, teacher, cached\n")
    found = json.loads((tmp_path / "steps.json").read_text())
    assert len(found["costs"]) == 12
    assert (found["batch_size"], found["fixed_length"], found["steps"]) == (4, 8, 2)
    assert (found["device"], found["dtype"], found["threads"]) == ("cpu", "fp32", 1)
    assert found["shape"] == "4 layers, hidden 32, 4 heads, intermediate 64"
    assert found["random_weights"] is False
    assert found["parameters"] > 0 and found["machine"]["cpu"] and found["versions"]["torch"]
    documented = (FOLDER / "benchmark_training.py").read_text()
    assert all(re.search(rf"^ *(\w+, )*{key}\b", documented, re.M) for key in found)
    assert all(re.search(rf"^  (\w+, )*{key}\b", documented, re.M) for key in found["costs"][0])
    again = run("benchmark_training", model_folder, *words, "--output", "steps.json")
    assert_fails(again, 1, r"steps\.json exists")


def test_trainings_of_a_configuration_are_chosen(run, tiny_yaml, sts_csv):
    words = ["--texts", sts_csv, "--batch-size", "4", "--steps", "2", "--fixed-length", "8"]
    code, out, err = run("benchmark_training", tiny_yaml, *words, "--trainings", "gates", "plain")
    assert code == 0, err
    assert "| batches | gates / plain (limit 1.10) |" in out and "teacher" not in out
    assert err.startswith("fixed length: 2 steps of plain, gates\n")


# write_report


def test_report_of_an_evaluation(run, arguments, tmp_path):
    assert run("evaluate_model", *arguments, "--no-speed")[0] == 0
    (tmp_path / "out" / "result.json").rename(tmp_path / "out" / "evaluation.json")
    code, out, err = run("write_report", "out", "--command", "make a", "--command", "make b")
    assert (code, out, err) == (0, "wrote out/report.md and out/report.html\n", "")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "```bash\nmake a\nmake b\n```" in text
    assert_fails(run("write_report", "out"), 1, r"out/report\.md exists\. To fix, .*--overwrite")
    assert run("write_report", "out", "--overwrite")[0] == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "python scripts/evaluate_model.py" in text


def test_report_of_a_run_that_is_not_complete(run, tmp_path):
    for name in ("out/metrics.jsonl", "runs/a/metrics.jsonl", "runs/a-recovery/metrics.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    command = ["write_report", "out", "--run", "runs/a"]
    message = r"out/model/pruning\.json: no such file\. To fix, prune, recover and extract first"
    assert_fails(run(*command), 1, message)
    (tmp_path / "runs" / "a-recovery" / "metrics.jsonl").unlink()
    message = r"runs/a-recovery/metrics\.jsonl: no such file\. To fix, prune, recover and extract"
    assert_fails(run(*command), 1, message)
    (tmp_path / "out" / "report.md").touch()
    assert_fails(run(*command), 1, r"out/report\.md exists\. To fix, .*--overwrite")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.jsonl", "report.md"}
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == "out/metrics.jsonl"


@pytest.mark.parametrize(
    ("name", "content"), [("evaluation.json", b'{"tasks": ['), ("gates.npz", b"PK\x03\x04 cut")]
)
def test_report_of_a_truncated_file(name, content, run, arguments, tmp_path):
    assert run("evaluate_model", *arguments, "--no-speed")[0] == 0
    (tmp_path / "out" / "result.json").rename(tmp_path / "out" / "evaluation.json")
    (tmp_path / "out" / name).write_bytes(content)
    assert_fails(run("write_report", "out"), 1, f"out/{name}:? .*To fix")
    assert not (tmp_path / "out" / "report.md").exists()


# The lock of the requirements


REQUIREMENTS = FOLDER.parent / "requirements.txt"


def test_every_pin_is_in_the_lock_and_every_package_has_hashes():
    """``pip install --require-hashes`` refuses a package that is not listed."""

    def pins(path: Path) -> set[str]:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [line.split(";")[0].split("\\")[0].strip() for line in lines if "==" in line]
        return {re.sub(r"[-_.]+(?=.*==)", "-", pin.lower()) for pin in found}

    locked = pins(REQUIREMENTS)
    assert pins(REQUIREMENTS.with_suffix(".in")) <= locked
    blocks = re.split(r"\n(?=\S)", REQUIREMENTS.read_text(encoding="utf-8"))
    packages = [block for block in blocks if re.match(r"[A-Za-z0-9._-]+==", block)]
    assert len(packages) >= len(locked)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in packages)
    assert not re.search(r"https?://", REQUIREMENTS.read_text(encoding="utf-8"))
