"""The command lines: exit codes, one clear line for a failure, and what lies there afterwards."""

import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from bge_pruning.config.load import load_config
from bge_pruning.model_io import example_models
from bge_pruning.model_io.example_models import EXAMPLE_MODELS, MINILM
from bge_pruning.utils.records import EvaluationRecord
from bge_pruning.workflows import family, pipeline, training_benchmark, training_commands
from bge_pruning.workflows.model_commands import default_output
from bge_pruning.workflows.stages import EvaluationPlan
from tests.common.runs import evaluation as sample_evaluation
from tests.common.script_process import load_script, new_process
from tests.common.trainings import PIPELINE

FOLDER = Path(__file__).parents[2] / "scripts"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
CHECK = r"no such file\. To fix, check the path"
NO_MODEL = r"model none is not a folder\. To fix, give a model's folder"
# By script: arguments with something wrong in them, the exit code, and what is said.
FAILURES = {
    "benchmark_efficiency": ("none", 1, NO_MODEL),
    "benchmark_training": ("none --texts none.txt", 1, rf"none\.txt: {CHECK}"),
    "check_index_compatibility": ("none none --texts none.txt", 1, NO_MODEL),
    "choose_shape": ("none.yaml", 2, rf"none\.yaml: {CHECK}"),
    "compare_runs": ("none --output out", 1, r"none: no such file\. To fix, give a results folder"),
    "evaluate_model": ("none --sts none.csv --output o.json", 1, rf"none\.csv: {CHECK}"),
    "extract_pruned_model": ("none out", 1, r"none: no such run folder or checkpoint\. To fix, c"),
    "export_family": ("none.yaml --sts none.csv", 2, rf"none\.yaml: {CHECK}"),
    "prepare_minilm": ("--sentences none.csv", 1, rf"none\.csv: {CHECK}"),
    "prepare_model": ("minilm --sentences none.csv", 1, rf"none\.csv: {CHECK}"),
    "train_heads": ("none.yaml", 2, rf"none\.yaml: {CHECK}"),
    "quickstart": ("seedd=1", 2, r"override 'seedd=1': unknown key 'seedd': did you mean 'seed'\?"),
    "run_pipeline": ("none.yaml --sts none.csv", 2, rf"none\.yaml: {CHECK}"),
    "run_quality_study": ("none.yaml", 2, rf"none\.yaml: {CHECK}"),
    "train_pruning": ("none.yaml", 2, rf"none\.yaml: {CHECK}"),
    "write_report": ("none", 1, r"none holds neither evaluation\.json nor .*s\.jsonl\. To fix"),
}
# Commands that argparse takes and we do not, with what is said.
EVALUATED = "evaluate_model m --sts a.csv --output o.json"
NO_TASK = "nothing to evaluate on: give --sts"
USAGE = [
    ("benchmark_efficiency m --batch-sizes 0", "batch sizes, lengths and seconds must be above 0"),
    ("benchmark_training m --texts t --steps 0", "sizes, lengths and steps must be above 0"),
    (
        "check_index_compatibility a b --texts t --max-length 0",
        "--limit, --batch-size and --max-length must be above 0",
    ),
    ("evaluate_model m --output o.json", NO_TASK),
    ("evaluate_model m --card --output o.json", NO_TASK),
    (f"{EVALUATED} --also =folder", ".*'=folder' is not NAME=FOLDER"),
    (f"{EVALUATED} --also name=", ".*'name=' is not NAME=FOLDER"),
    (f"{EVALUATED} --also model=a", "--also: two models would be called model; choose another"),
    (f"{EVALUATED} --also a=b --also a=c", "--also: two models would be called a; choose another"),
    (f"{EVALUATED} --index i.json", "--index needs --card"),
    (f"{EVALUATED} --push-to-hub me/x", "--push-to-hub needs --card"),
    ("evaluate_model m --card --private", "--private needs --push-to-hub"),
    (
        f"{EVALUATED} --card --evaluation e.json",
        "--evaluation is of an earlier evaluation: leave it or the tasks out",
    ),
    ("evaluate_model m --otput o.json", r"there is no option --otput: did you mean --output\?$"),
    ("evaluate_model m n", r"unexpected 'n'\. To fix, see --help\.$"),
    ("evaluate_model m --seed thirty", r"--seed: expected a whole number, not 'thirty'$"),
    ("evaluate_model m --output", r"--output: expected a value$"),
    ("evaluate_model m --sts --no-speed", r"--sts: expected a value or more$"),
    ("benchmark_efficiency m --dtype f", r"--dtype: 'f' is not one of 'fp32', 'bf16', 'fp16'$"),
    ("export_family a.yaml", NO_TASK),
    ("export_family a.yaml --densities half", r"--densities: expected a number, not 'half'$"),
    ("extract_pruned_model run out --onxx", r"there is no option --onxx: did you mean --onnx\?$"),
    ("extract_pruned_model run out --zz", r"there is no option --zz\. To fix, see --help\.$"),
    (
        "train_pruning a.yaml --dry-run",
        r"there is no option --dry-run: did you mean dry_run=true\?$",
    ),
    (
        "run_pipeline a.yaml --sts F --seed 3",
        r"there is no option --seed: did you mean seed=\.\.\.\?$",
    ),
    ("choose_shape a.yaml --max-duraton=3ba", r".* did you mean max_duration=\.\.\.\?$"),
    ("extract_pruned_model run out --fit-texts a.txt", "--fit-texts needs --keep-dimension"),
    (
        "extract_pruned_model run out --languages de --vocabulary-size 0",
        "--vocabulary-size must be above 0",
    ),
    ("extract_pruned_model run out --languages ' , '", ".*' , ' names no language"),
    ("extract_pruned_model run out --private", "--private needs --push-to-hub"),
    ("prepare_model bge-m3", "model: 'bge-m3' is not one of 'minilm', 'm3-small'"),
    ("prepare_model m3-small --sentences a.csv", "--sentences needs minilm with heads: no other"),
    ("prepare_model minilm --sentences a.csv --without-heads", "--sentences needs minilm with"),
    ("run_pipeline a.yaml", NO_TASK),
    ("run_pipeline a.yaml --sts a.csv --overwrite", "--overwrite needs --only cut"),
]


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


def sample_record() -> EvaluationRecord:
    return EvaluationRecord(**sample_evaluation())


def write_pairs(path: Path, *rows: str) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


# All of them


@pytest.mark.parametrize("name", SCRIPTS)
def test_failure_is_one_line_and_a_code(name, run, tmp_path, monkeypatch):
    if name == "quickstart":
        monkeypatch.setattr(
            training_commands, "prepare", lambda *_: pytest.fail("arguments come first")
        )
        for folder in ("configs", "data"):
            (tmp_path / folder).symlink_to(FOLDER.parent / folder)
    words, code, message = FAILURES[name]
    before = set(tmp_path.rglob("*"))
    assert_fails(run(name, *words.split()), code, message)
    assert set(tmp_path.rglob("*")) == before


def test_code_reaches_the_shell(monkeypatch):
    words, code, _ = FAILURES["compare_runs"]
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *words.split()])
    with pytest.raises(SystemExit) as stop, new_process():
        runpy.run_path(str(FOLDER / "compare_runs.py"), run_name="__main__")
    assert stop.value.code == code


@pytest.mark.parametrize(("command", "message"), USAGE)
def test_wrong_usage_is_code_2(command, message, capsys, tmp_path):
    name, *words = shlex.split(command)
    with pytest.raises(SystemExit) as stop:
        load_script(name).main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"[^:]+: error: {message}", line)
    assert not list(tmp_path.iterdir())


# train_pruning


@pytest.fixture
def trained(trained_run) -> Path:
    """The folder of a run, which is only read."""
    return trained_run


def test_a_training_leaves_a_checkpoint_and_a_plan_nothing(run, tiny_yaml, tmp_path):
    before = set(tmp_path.rglob("*"))
    code, out, err = run("train_pruning", tiny_yaml, "dry_run=true")
    assert code == 0 and re.fullmatch(r"\S+ loading libraries\n", err)
    assert "target       3 layers, hidden 24, 3 heads, intermediate 48" in out
    assert set(tmp_path.rglob("*")) == before
    code, out, err = run("train_pruning", tiny_yaml, "max_duration=1ba")
    assert (code, out) == (0, "") and "step 1 | " in err
    assert (tmp_path / "runs" / "tiny" / "latest-rank0.pt").is_file()


SIZES = "{d_model: 1024, n_heads: 16, n_layers: 24, intermediate_size: 4096, vocab_size: 250002}"
SOURCE = "data.%s=[{name: x, kind: %s, path: '%s'}]"


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (SOURCE % ("train", "sts", "no.csv"), 1, r"no\.csv: no such file\. To fix, check the path"),
        (SOURCE % ("train", "sts", "b*.csv"), 1, r"b\*\.csv: fits no file\. To fix, check the pat"),
        (SOURCE % ("eval", "sts", "wrong.csv"), 1, r"wrong\.csv:1: names no column sentence1, "),
        (SOURCE % ("eval", "beir", "."), 1, r"corpus\.jsonl: no such file"),
        (SOURCE % ("train", "sts", "empty.csv"), 1, "x: holds no rows. To fix, ch"),
        (SOURCE % ("train", "sts", "."), 1, r"\.: is a folder, expected a f"),
        ("teacher.base_model=/no/where", 1, "base_model '/no/where' is neither a folder nor a hub"),
        ("run_folder=used", 1, "used is in use and is kept. To fix, set another run_name"),
        ("data.processed_folder=wrong.csv", 2, "data.processed_folder wrong.csv is a file"),
        ("loss={sts_regression: 1.0, contrastive: 1.0}", 2, "loss.contrastive needs data.train of"),
        ("method=random model.l0_module.target_density=0.8", 2, "method 'random' needs a"),
    ],
)
def test_a_dry_run_refuses_what_cannot_run_after_its_plan(
    overrides, code, message, run, tiny_yaml, tmp_path
):
    (tmp_path / "wrong.csv").write_text("Satz1,Satz2,Wertung\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    words = [overrides] if "{" in overrides else overrides.split()
    before = set(tmp_path.rglob("*"))
    got, out, err = run("train_pruning", tiny_yaml, *words, "dry_run=true")
    assert got == code and out.startswith("base model ") and "memory " in out
    assert re.match(f"error: {message}", err.splitlines()[-1]) and err.count("error: ") == 1
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (
            ["model.base_model=experiments/checkpoints/minilm-xlmr"],
            1,
            r".*/minilm-xlmr is not there yet\. To fix, run scripts/prepare_model\.py minilm\.$",
        ),
        (
            ["model.base_model=experiments/checkpoints/m3-small-encoder"],
            1,
            r".* run scripts/prepare_model\.py m3-small --without-heads --output .*-encoder\.$",
        ),
        (["model.base_model=/no/where"], 1, "base_model '/no/where' is neither a"),
        (
            ["stage=recover"],
            2,
            r"stage=recover starts from .*/results/tiny/pruned_model, which is not there yet\. To "
            r"fix, run scripts/extract_pruned_model\.py .*/runs/tiny .*/pruned_model\.$",
        ),
        (["stage=recover", "method=random"], 2, "stage=recover .*run_pipeline.*--only cut"),
    ],
)
@pytest.mark.parametrize("more", [[], ["dry_run=true"]])
def test_a_model_that_is_not_there_has_no_plan(more, overrides, code, message, run, tiny_yaml):
    """Its sizes are not those of BGE-M3."""
    words = [*overrides, f"model={SIZES}", *more]
    assert_fails(run("train_pruning", tiny_yaml, *words), code, message)


def test_a_baseline_has_a_plan(run, tiny_yaml):
    code, out, err = run("train_pruning", tiny_yaml, "method=random", "dry_run=true")
    assert code == 0 and "error" not in err and "chosen by    random, without gates" in out


# extract_pruned_model


def test_extraction_passes_its_arguments_on(run, monkeypatch):
    """Which checkpoint is the best: model_io/test_checkpoint.py."""
    from bge_pruning.export import extract

    calls = []
    monkeypatch.setattr(extract, "extract", lambda *args: calls.append(args[:4]))
    for words in ([], ["--best"], ["--overwrite"]):
        assert run("extract_pruned_model", "run", "small", *words)[:2] == (0, "")
        expected = (Path("run"), Path("small"), "--overwrite" in words, "--best" in words)
        assert calls.pop() == expected


def test_extraction_with_everything(run, trained, tmp_path):
    (tmp_path / "texts.txt").write_text("the man plays a flute\nthe dog\n" * 2)
    pairs = write_pairs(tmp_path / "pairs.csv", "the man,a dog,1", "the man,the man,5", "a,dog,2")
    code, out, err = run(
        *(
            "extract_pruned_model",
            trained,
            "new/small",
            "--dtype",
            "bf16",
            "--colbert-dim",
            "hidden",
        ),
        *("--keep-dimension", "--onnx", "--onnx-int8", "--int8-sts", pairs),
        *("--keep-vocabulary-from", "texts.txt", "--languages", "en, de", "--vocabulary-size", 20),
        *("--report-on", "texts.txt"),
    )
    assert (code, out) == (0, ""), err
    said = r"wrote new/small \(\S+ kB\): 3 layers, hidden 24, 3 heads, intermediate 48; .* in "
    said += "bfloat16; dense vectors of 32, multi-vectors of 24; largest difference from"
    assert re.search(said, err)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["small"]
    info = json.loads((tmp_path / "new" / "small" / "pruning.json").read_text())
    assert info["precision"]["dtype"] == "bfloat16"
    assert info["multi_vector"]["colbert_dim"] == 24
    assert info["projection"]["dimensions"] == 32
    assert info["vocabulary"]["vocabulary"]["kept"] <= 20
    corpora = [Path(row["corpus"]).name for row in info["vocabulary"]["coverage"]]
    chosen = ["texts.txt", "newstest2019-en.txt.gz", "newstest2019-de.txt.gz"]
    assert corpora[:3] == chosen
    assert info["onnx_int8"]["spearman"]["pairs"] == 3
    assert (tmp_path / "new" / "small" / "onnx" / "model_quantized.onnx").is_file()


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


# export_family


def test_a_family(run, monkeypatch):
    calls = []
    folder = Path("family/50pct")
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(sample_evaluation()))
    monkeypatch.setattr(family, "export_family", lambda *a: calls.append(a) or [folder])
    words = ["a.yaml", "seed=1", "--densities", "0.5", "--sts", "b.csv", "--run", "c"]
    code, out, err = run("export_family", *words)
    assert code == 0, err
    assert re.search(r"^ *50pct ", out, re.MULTILINE), out
    assert out.splitlines()[-1] == "models   family/50pct/model"
    plan = EvaluationPlan(["b.csv"], [], None, ["dense"])
    assert calls == [(["a.yaml"], ["seed=1"], [0.5], plan, Path("c"))]


# evaluate_model --card


@pytest.fixture
def pushed(monkeypatch) -> list:
    """What is asked of the hub, instead of asking."""
    from bge_pruning.export import hub_upload

    calls = []
    monkeypatch.setattr(hub_upload, "check_hub_access", lambda *a: calls.append(a))
    monkeypatch.setattr(hub_upload, "push_to_hub", lambda *a: calls.append(a) or "https://hub/x")
    return calls


def test_uploads_of_an_extraction_and_of_a_card(run, trained, pushed):
    hub = ["--push-to-hub", "me/x", "--private"]
    asked = [("me/x",), (Path("small"), "me/x", True)]
    code, out, _ = run("extract_pruned_model", trained, "small", *hub)
    assert (code, out, pushed) == (0, "uploaded to https://hub/x\n", asked)
    assert Path("small/pruning.json").is_file()
    pushed.clear()
    code, out, err = run("evaluate_model", "small", "--card")
    assert (code, out, pushed) == (0, "wrote small/README.md\n", []), err
    assert "wrote" not in err  # it is said once
    code, out, _ = run("evaluate_model", "small", "--card", *hub)
    assert (code, out) == (0, "wrote small/README.md\nuploaded to https://hub/x\n")
    assert pushed == asked
    message = r"none\.json: no such file\. To fix, give the JSON file that scripts/"
    for option, script in (("--evaluation", "evaluate_model"), ("--index", "check_index_compat")):
        missing = run("evaluate_model", "small", "--card", option, "none.json")
        assert_fails(missing, 1, message + script)


def test_an_evaluation_and_its_card_in_one_command(run, trained, sts_csv, monkeypatch):
    from bge_pruning.evaluation import evaluate
    from bge_pruning.export import model_card

    calls = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: sample_record())
    monkeypatch.setattr(model_card, "write_model_card", lambda *a: calls.append(a) or "README.md")
    assert run("extract_pruned_model", trained, "small")[0] == 0
    words = ["--card", "--sts", sts_csv, "--no-speed", "--device", "cpu", "--output", "o.json"]
    code, out, err = run("evaluate_model", "small", *words)
    assert code == 0, err
    assert out.endswith("wrote README.md\n")
    assert calls == [(Path("small"), file, None) for file in (None, Path("o.json"))]


def test_a_card_that_cannot_be_is_noticed_first(run, trained, monkeypatch, tmp_path, arguments):
    """Of what was not extracted, or to be uploaded where that cannot work."""
    import huggingface_hub

    message = r".*: holds no pruning\.json, so it is not an extracted model and its README\.md is"
    assert_fails(run("evaluate_model", "none", "--card"), 1, message)
    assert_fails(run("evaluate_model", *arguments, "--card"), 1, message)
    assert not Path("out").exists()
    assert run("extract_pruned_model", trained, "small")[0] == 0
    (tmp_path / "small" / "README.md").unlink()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for name, message in (
        ("me/x", r"there is no token for the Hugging Face hub\. To fix, run 'hf auth"),
        ("x", r"'x' cannot be the name of a model on the hub\. To fix, choose owner"),
    ):
        result = run("evaluate_model", "small", "--card", "--push-to-hub", name)
        assert_fails(result, 1, message)
    assert not (tmp_path / "small" / "README.md").exists()


# evaluate_model


@pytest.fixture
def arguments(model_folder, sts_csv) -> list:
    """Of an evaluation that works and is quick."""
    common = ["--sts", sts_csv, "--device", "cpu", "--output", "out/result.json"]
    return [model_folder, "--baseline", model_folder, *common]


def test_a_result_is_written_beside_the_model(run, model_folder, sts_csv, monkeypatch):
    from bge_pruning.evaluation import evaluate

    given = {}
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **o: given.update(o) or sample_record())
    shutil.copytree(model_folder, "x/model")
    prompts = ["--query-prompt", "q: ", "--document-prompt", ""]
    code, out, err = run("evaluate_model", "x/model", "--sts", sts_csv, *prompts)
    assert code == 0, err
    assert out.endswith("wrote x/evaluation.json and x/evaluation.md\n")
    assert Path("x/evaluation.json").is_file()
    assert given["prompts"] == {"query": "q: ", "passage": ""}
    for model, expected in (("x", "x"), ("x/model/config.json", "x/model"), ("BAAI/bge-m3", ".")):
        assert default_output(model) == Path(expected, "evaluation.json")


def test_an_existing_result_is_kept(run, arguments, monkeypatch):
    """Before the work, and when it fails. What is written: evaluation/test_evaluate.py."""
    from bge_pruning.evaluation import evaluate

    output = Path("out/result.json")
    output.parent.mkdir()
    output.write_text("mine")
    result = run("evaluate_model", "./none", *arguments[1:], "--overwrite")
    assert_fails(result, 1, r"model \./none is not a folder\. To fix, give a model's folder, a run")
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("evaluates"))
    message = r"out/result\.json exists\. To fix, .*pass --overwrite"
    assert_fails(run("evaluate_model", *arguments), 1, message)
    assert output.read_text() == "mine"


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


# run_pipeline


def test_only_the_cut_of_a_baseline(run, tiny_yaml, tmp_path):
    """More about it: workflows/test_baselines.py, and the replayed commands of test_pipeline.py."""
    command = ["run_pipeline", tiny_yaml, "method=magnitude", "--only", "cut"]
    code, out, err = run(*command)
    assert code == 0, err
    folder = tmp_path / "results" / "tiny" / "pruned_model"
    assert out == f"wrote {folder}\n"
    assert re.search(rf"wrote {folder} \(\S+ kB\): 3 layers, hidden 24", err)
    assert json.loads((folder / "pruning.json").read_text())["method"] == "magnitude"
    assert_fails(run(*command), 1, ".*pruned_model exists and is kept. To fix, .*--overwrite")
    assert run(*command, "--overwrite")[0] == 0
    assert_fails(run("run_pipeline", tiny_yaml, "--only", "cut"), 2, ".*l0.*To fix")


@pytest.fixture
def recorded(monkeypatch):
    """What the pipeline is called with, instead of running it."""
    calls, answers = [], []
    monkeypatch.setattr(
        pipeline, "run_pipeline", lambda *args: calls.append(args) or (answers or [{}])[0]
    )
    return calls, answers


@pytest.mark.parametrize(
    "words",
    [
        "a.yaml b.yaml seed=1 x.y=2 --sts c.csv d.csv",
        "a.yaml seed=1 --sts c.csv d.csv -- b.yaml x.y=2",
        "a.yaml --sts c.csv d.csv b.yaml seed=1 x.y=2",
        "a.yaml --sts c.csv seed=1 --sts d.csv --modes dense b.yaml x.y=2",
        "--sts c.csv d.csv a.yaml seed=1 b.yaml --modes dense x.y=2",
    ],
)
def test_pipeline_arguments(words, run, recorded):
    """Nothing is printed where there is nothing: on all ranks but the first."""
    calls, answers = recorded
    assert run("run_pipeline", *words.split())[:2] == (0, "")
    plan = EvaluationPlan(["c.csv", "d.csv"], [], None, ["dense"])
    assert calls == [(["a.yaml", "b.yaml"], ["seed=1", "x.y=2"], plan)]
    answers.append(sample_record())
    code, out, _ = run("run_pipeline", *words.split())
    assert code == 0 and re.search(r"stsb-en-test, Spearman\s+dense +0\.8200 ", out), out


def test_a_file_whose_name_looks_like_an_override_is_a_task(run, recorded, tmp_path):
    (tmp_path / "lr=1.csv").touch()
    assert run("run_pipeline", "a.yaml", "--sts", "lr=1.csv", "seed=1")[0] == 0
    ((paths, overrides, plan),) = recorded[0]
    assert (paths, overrides, plan.sts) == (["a.yaml"], ["seed=1"], ["lr=1.csv"])


def test_pipeline_is_interrupted(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_pipeline", interrupt)
    assert_fails(run("run_pipeline", "a.yaml", "--sts", "b.csv"), 130, "stopped by Ctrl-C")


# quickstart


@pytest.fixture
def prepared(tiny_yaml, sts_csv, monkeypatch) -> list:
    """The script is on the tiny model; what it prepares, instead of preparing."""
    calls = []
    monkeypatch.setattr(training_commands, "prepare", calls.append)
    for name in ("QUICKSTART", "MULTILINGUAL"):
        example = getattr(training_commands, name)
        judged_by = {**example.judged_by, "sts": [str(sts_csv)], "retrieval": []}
        judged_by.pop("parallel", None)
        changed = replace(example, config=str(tiny_yaml), judged_by=judged_by)
        monkeypatch.setattr(training_commands, name, changed)
    return calls


@pytest.mark.parametrize("words", [[], ["--multilingual"]])
def test_quickstart_needs_the_files_of_the_repository(words, run):
    example = training_commands.MULTILINGUAL if words else training_commands.QUICKSTART
    assert all((FOLDER.parent / name).exists() for name in (example.config, *example.files()))
    assert_fails(
        run("quickstart", *words),
        1,
        rf"{re.escape(example.config)}: no such file\. .* To fix, clone the repository and",
    )


def test_a_quickstart_is_of_the_model_that_it_prepares(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    for example in (training_commands.QUICKSTART, training_commands.MULTILINGUAL):
        found = load_config([example.config]).model.base_model
        assert Path(found) == example.model.output


@pytest.mark.parametrize("name", ["QUICKSTART", "MULTILINGUAL"])
def test_quickstart_prepares_prunes_and_says_where(
    name, run, recorded, prepared, tiny_yaml, monkeypatch
):
    example = getattr(training_commands, name)
    words = ["--multilingual"] if name == "MULTILINGUAL" else []
    monkeypatch.setenv("COLUMNS", "200")
    calls, answers = recorded
    answers.append(sample_record())
    for folder in ("q" * 100, "v2 [half]"):  # paths are printed as they are
        calls.clear()
        overrides = ["max_duration=2ba", f"results_folder='{folder}'"]
        code, out, err = run("quickstart", *words, *overrides)
        assert code == 0, err
        assert prepared.pop() == example.model
        replacing = ["overwrite=true", *overrides]  # what was made before
        assert calls == [([str(tiny_yaml)], replacing, EvaluationPlan(**example.judged_by))]
        assert "original" in out
        assert out.endswith(f"model    {folder}/model\nreport   {folder}/report.html\n")


def test_the_quickstart_in_many_languages(
    run, tiny_yaml, sts_csv, collection, tmp_path, monkeypatch
):
    """From the command to the means over its tasks, with the tiny model."""
    pairs = [str(shutil.copy(sts_csv, tmp_path / f"pairs-{n}.csv")) for n in ("de", "en")]
    for language in ("de", "en", "fr"):
        lines = [f"{word} {language} plane {n}" for n, word in enumerate(("A", "The", "One"))]
        (tmp_path / f"news-{language}.txt").write_text("\n".join(lines))
    judged_by = {**training_commands.MULTILINGUAL.judged_by, "max_length": 8}
    judged_by |= {"sts": pairs, "retrieval": [str(collection)]}
    judged_by |= {"parallel": {f"{tmp_path}/news-{{language}}.txt": ["de-en", "fr-de"]}}
    example = replace(
        training_commands.MULTILINGUAL, config=str(tiny_yaml), judged_by={**judged_by, "lines": ":"}
    )
    monkeypatch.setattr(training_commands, "MULTILINGUAL", example)
    monkeypatch.setattr(training_commands, "prepare", lambda _: None)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("quickstart", "--multilingual", *PIPELINE)
    assert code == 0, err
    results = Path(load_config([tiny_yaml], PIPELINE).results_folder)
    found = json.loads((results / "evaluation.json").read_text(encoding="utf-8"))
    modes, kinds = ["dense", "sparse", "colbert", "all"], ("2 similarity", "3 retrieval")
    assert [e["mode"] for e in found["means"]] == 2 * modes
    assert found["max_length"] == 8 and "also" not in found["tasks"][0]
    report = " ".join((results / "report.md").read_text(encoding="utf-8").split())
    for kind in kinds:
        assert f"mean of {kind} tasks" in out and f"mean of {kind} tasks" in report
    assert "Of the original's mean of 3 retrieval tasks it keeps: dense " in report
    assert "news-fr-de, nDCG@10" in out
    assert "--max-length 8" in (results / "commands.txt").read_text(encoding="utf-8")


# prepare_model, prepare_minilm


@pytest.mark.parametrize("model", EXAMPLE_MODELS.values(), ids=EXAMPLE_MODELS)
def test_preparing_passes_its_arguments_on(model, run, monkeypatch, tmp_path):
    example_models.write_record(tmp_path, example_models.identify(model))
    code, out, err = run("prepare_model", model.key, "--output", tmp_path)
    assert (code, out) == (0, "")
    assert err.endswith(f" {tmp_path} already holds {model.name}; nothing to do\n")
    calls = []
    monkeypatch.setattr(
        training_commands, "prepare", lambda *args, **options: calls.append((*args, options))
    )
    fit, plain = Path("data/sts/stsb-en-train.csv"), {"heads": True, "overwrite": False}
    assert run("prepare_model", model.key)[0] == 0
    words = ["--output", "o", "--overwrite", "--without-heads"]
    assert run("prepare_model", model.key, *words)[0] == 0
    given = (model, Path("o"), fit, {"heads": False, "overwrite": True})
    assert calls == [(model, None, fit, plain), given]
    if model is MINILM:
        assert run("prepare_minilm", "--sentences", "s.csv")[0] == 0
        assert calls.pop() == (model, None, Path("s.csv"), plain)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("extract_pruned_model {run} thesis --overwrite", r"thesis holds no pruning\.json"),
        ("prepare_minilm --output thesis --sentences {sts}", "thesis .*is kept.*To fix"),
        ("prepare_minilm --output thesis --sentences {sts} --overwrite", "thesis .*is kept.*To f"),
        ("prepare_model m3-small --output thesis --overwrite", "thesis holds no conversion.*To fi"),
    ],
)
def test_somebody_elses_folder_is_kept(command, message, run, trained, sts_csv, tmp_path):
    mine = tmp_path / "thesis" / "chapter1.txt"
    mine.parent.mkdir()
    mine.write_text("ten years of work")
    assert_fails(run(*command.format(run=trained, sts=sts_csv).split()), 1, message)
    assert mine.read_text() == "ten years of work"


def test_a_mode_or_a_collection_that_is_wrong(run, model_folder):
    words = [model_folder, "--output", "o.json", "--retrieval"]
    message = r"none/qrels/test.tsv: no such file. To fix, check the path"
    assert_fails(run("evaluate_model", *words, "./none"), 1, message)
    message = "none: no such file or folder; as a name, mteb .* has no task 'none'.* To fix"
    assert_fails(run("evaluate_model", *words, "none"), 1, message)
    assert not Path("o.json").exists()


# benchmark_efficiency, benchmark_training


def test_efficiency_is_measured_and_written(run, tiny_yaml, sts_csv, tmp_path):
    words = ["--texts", sts_csv, "--lengths", "4", "--batch-sizes", "2", "--seconds", "0.01"]
    words += ["--runtimes", "onnx", "torch", "--output", "speed.json"]
    code, out, err = run("benchmark_efficiency", tiny_yaml, *words)
    assert code == 0, err
    assert f"model:    {tiny_yaml} (target, random weights), 3 layers, hidden 24" in out
    assert f"baseline: {tiny_yaml} (source, random weights), 4 layers, hidden 32" in out
    assert "| runtime | texts | tokens | ms (p95) |" in out
    rows = re.findall(r"^\| (torch|onnx) \| (\w+) \| (.+?) \|", out, re.MULTILINE)
    assert [row[:2] for row in rows] == [("torch", "2")] * 2 + [("onnx", "2")] * 2
    assert [row[2] for row in rows[:2]] == [row[2] for row in rows[2:]]
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [setting["length"] for setting in found["settings"]] == [4, "real"] * 2
    again = run("benchmark_efficiency", tiny_yaml, *words)
    assert_fails(again, 1, r"speed\.json exists")
    assert run("benchmark_efficiency", tiny_yaml, *words, "--overwrite")[0] == 0


def test_training_steps_are_measured_and_written(run, tiny_yaml, sts_csv, tmp_path, monkeypatch):
    """Of chosen trainings, of a configuration; the others: workflows/test_training_benchmark.py."""
    monkeypatch.setattr(training_benchmark, "measure_flops", lambda *_: 1e9)  # takes seconds
    words = ["--texts", sts_csv, "--batch-size", "4", "--steps", "2", "--fixed-length", "8"]
    words += ["--trainings", "gates", "plain", "--output", "steps.json"]
    code, out, err = run("benchmark_training", tiny_yaml, *words)
    assert code == 0, err
    assert "| batches | gates / plain (limit 1.10) |" in out and "teacher" not in out
    assert "\nfixed length: 2 steps of plain, gates\n" in err
    found = json.loads((tmp_path / "steps.json").read_text())
    assert len(found["costs"]) == 6
    assert (found["batch_size"], found["fixed_length"], found["steps"]) == (4, 8, 2)
    assert (found["device"], found["dtype"], found["threads"]) == ("cpu", "fp32", 1)
    assert found["shape"] == "4 layers, hidden 32, 4 heads, intermediate 64"
    assert found["random_weights"] is True
    assert found["parameters"] > 0 and found["machine"]["cpu"] and found["versions"]["torch"]
    documented = (FOLDER / "benchmark_training.py").read_text()
    assert all(re.search(rf"^ *(\w+, )*{key}\b", documented, re.M) for key in found)
    assert all(re.search(rf"^  (\w+, )*{key}\b", documented, re.M) for key in found["costs"][0])
    assert_fails(run("benchmark_training", tiny_yaml, *words), 1, r"steps\.json exists")


# write_report


@pytest.fixture
def evaluated(tmp_path) -> Path:
    """A results folder of an evaluation alone."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text(json.dumps(sample_evaluation()))
    return tmp_path / "out"


def test_report_of_an_evaluation(run, evaluated):
    code, out, err = run("write_report", "out", "--command", "make a", "--command", "make b")
    assert (code, out, err) == (0, "wrote out/report.md and out/report.html\n", "")
    text = (evaluated / "report.md").read_text(encoding="utf-8")
    assert "```bash\nmake a\nmake b\n```" in text
    assert_fails(run("write_report", "out"), 1, r"out/report\.md exists\. To fix, .*--overwrite")
    assert run("write_report", "out", "--overwrite")[0] == 0
    text = (evaluated / "report.md").read_text(encoding="utf-8")
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
def test_report_of_a_truncated_file(name, content, run, evaluated):
    (evaluated / name).write_bytes(content)
    assert_fails(run("write_report", "out"), 1, f"out/{name}:? .*To fix")
    assert not (evaluated / "report.md").exists()


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
