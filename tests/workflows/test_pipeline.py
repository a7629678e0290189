"""The whole life of a run: what it leaves behind, its commands, and what it refuses before work."""

import os
import re
import runpy
import shlex
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import bge_pruning.train
from bge_pruning.callbacks.data_callback import DataCallback
from bge_pruning.config.load import ConfigError, load_config
from bge_pruning.training import rank_watch
from bge_pruning.utils.run_log import StoppedError
from bge_pruning.workflows import options as opt
from bge_pruning.workflows import pipeline
from bge_pruning.workflows.pipeline import run_pipeline, step_commands
from bge_pruning.workflows.stages import EvaluationPlan
from tests.common.trainings import PIPELINE, TARGET, losses, read_json

ROOT = Path(__file__).parents[2]
AXES = dict(zip(("hidden", "head", "layer", "intermediate"), TARGET.values(), strict=True))
NO_TARGET = "model.l0_module.target_model=null"


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def results(finished_pipeline) -> Path:
    return finished_pipeline.results


# What it leaves behind

FILES = """
commands.txt config.yaml constraint.png evaluation.json evaluation.md gates.npz gates.png
metrics-recovery.jsonl metrics.jsonl model multipliers.png pruned_model pruning.json recovery.png
report.html report.md scores.png summary.png training.png
"""


def test_results_folder_holds_everything_and_nothing_else(finished_pipeline, results):
    assert {path.name for path in results.iterdir()} == set(FILES.split())
    asked = load_config([finished_pipeline.yaml], PIPELINE)
    assert load_config([results / "config.yaml"]) == asked


def test_both_models_have_the_target_shape(results):
    from transformers import AutoModel

    batches = {"pruned_model": {"prune": 4}, "model": {"prune": 4, "recover": 3}}
    for name, expected in batches.items():
        model = AutoModel.from_pretrained(results / name)
        assert {key: getattr(model.config, key) for key in TARGET} == TARGET
        info = read_json(results / name / "pruning.json")
        assert info["batches"] == expected
        encoder = sum(p.numel() for p in model.encoder.parameters())
        assert info["parameters"]["extracted"]["encoder"] == encoder
    assert read_json(results / "pruning.json") == read_json(results / "model" / "pruning.json")


def test_recovery_started_from_the_pruned_model_and_trained_it(
    results, finished_pipeline, load_state
):
    from safetensors.torch import load_file

    pruned, recovered = (
        load_file(results / name / "model.safetensors") for name in ("pruned_model", "model")
    )
    moved = {name: (pruned[name] - recovered[name]).abs().max().item() for name in pruned}
    # One step of Adam at a learning rate of 1e-3.
    assert 0 < moved["encoder.layer.0.output.dense.weight"] < 3e-3
    assert max(moved.values()) < 3e-3
    trained = load_state(finished_pipeline.folder / "runs" / "tiny-recovery")["model"]
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(trained[f"backbone.{name}"], recovered[name])


def test_gates_agree_with_the_cut(results):
    kept = read_json(results / "pruning.json")["kept"]
    with np.load(results / "gates.npz") as gates:
        assert set(gates.files) == {*AXES, *(f"{axis}_kept" for axis in AXES)}
        for axis, count in AXES.items():
            open_probability, stays = gates[axis], gates[f"{axis}_kept"]
            assert open_probability.shape == stays.shape
            assert ((open_probability > 0) & (open_probability < 1)).all()
            if stays.ndim == 1:
                assert np.flatnonzero(stays).tolist() == kept[axis]
            else:
                assert set(stays[kept["layer"]].sum(1)) == {count}


def test_metrics_are_those_of_the_two_runs(results, finished_pipeline):
    for suffix, steps in (("", 4), ("-recovery", 3)):
        run = finished_pipeline.folder / "runs" / f"tiny{suffix}"
        written = (results / f"metrics{suffix}.jsonl").read_bytes()
        assert written == (run / "metrics.jsonl").read_bytes()
        assert len(losses(run)) == steps


def test_evaluation_is_that_of_the_written_models(
    results, finished_pipeline, model_folder, sts_csv
):
    from sentence_transformers import SentenceTransformer

    evaluation = read_json(results / "evaluation.json")
    assert evaluation == finished_pipeline.evaluation.as_dict()
    task, pearson = evaluation["tasks"]
    assert pearson["metric"] == "cosine_pearson"
    rows = [line.split(",") for line in sts_csv.read_text(encoding="utf-8").splitlines()]

    def score(folder: Path) -> float:
        model = SentenceTransformer(str(folder), device="cpu")
        a, b = (model.encode([row[i] for row in rows]) for i in (0, 1))
        return spearmanr((a * b).sum(1), [float(row[2]) for row in rows]).statistic

    assert task["task"] == "tiny"
    assert task["value"] == pytest.approx(score(results / "model"), abs=1e-3)
    assert task["baseline"] == pytest.approx(score(model_folder), abs=1e-3)
    expected = {"pruned, before recovery": score(results / "pruned_model")}
    assert task["also"] == pytest.approx(expected, abs=1e-3)
    assert task["value"] != task["also"]["pruned, before recovery"]
    assert evaluation["speed"]["throughput_texts_per_s"]["ratio"] > 0


def test_card_and_report_hold_the_result(results):
    evaluation = read_json(results / "evaluation.json")
    assert read_json(results / "model" / "evaluation.json") == evaluation
    task, _ = evaluation["tasks"]
    card, other, report = (
        (results / name).read_text(encoding="utf-8")
        for name in ("model/README.md", "pruned_model/README.md", "report.md")
    )
    assert f"| {task['task']} | dense | Spearman | {task['baseline']:.4f} |" in card
    assert "Quality: not measured." in other
    assert report.startswith("# Pruned tiny-xlmr\n")
    assert f"it scores {task['value']:.4f} against {task['baseline']:.4f}" in report
    assert "the gates never reached the target" in report  # nor could they in four steps
    assert (results / "commands.txt").read_text(encoding="utf-8") in report
    assert "Left out" not in report


# Its commands


def run_commands(commands: list[str]) -> None:
    for line in commands:
        python, script, *arguments = shlex.split(line)
        assert python == "python"
        assert runpy.run_path(str(ROOT / script))["main"](arguments) == 0, line


@pytest.mark.slow
def test_commands_make_the_same(results, finished_pipeline, tmp_path, make_yaml):
    """The commands of ``commands.txt``, one by one, in another place: models, card and report."""
    make_yaml(tmp_path)
    text = (results / "commands.txt").read_text(encoding="utf-8")
    run_commands(text.replace(str(finished_pipeline.folder), str(tmp_path)).splitlines())
    by_hand = tmp_path / "results" / "tiny"
    for name in ("pruned_model", "model"):
        assert tree(by_hand / name) == tree(results / name)
        weights = Path(name) / "model.safetensors"
        assert (by_hand / weights).read_bytes() == (results / weights).read_bytes()

    def card_without_times(folder: Path) -> str:
        card = (folder / "model" / "README.md").read_text(encoding="utf-8")
        return re.sub(r"^## Size and speed.*?^## ", "", card, flags=re.MULTILINE | re.DOTALL)

    def tasks(folder: Path) -> list[dict]:
        tasks = read_json(folder / "evaluation.json")["tasks"]
        return [{key: value for key, value in task.items() if key != "seconds"} for task in tasks]

    def headings(folder: Path) -> list[str]:
        text = (folder / "report.md").read_text(encoding="utf-8")
        return re.findall(r"^#.*|!\[.*", text, re.MULTILINE)

    for part in (card_without_times, tasks, headings):
        assert part(by_hand) == part(results)


def words_of(yaml: Path, *overrides: str, sts: list[str], files: tuple = ()) -> list[list[str]]:
    """The commands of a configuration, word by word."""
    configs = [load_config([yaml], [*overrides, f"stage={s}"]) for s in ("prune", "recover")]
    given = [o for o in overrides if not o.startswith("model.base_model")]
    commands = step_commands(*configs, list(files) or [str(yaml)], given, EvaluationPlan(sts))
    return [shlex.split(command) for command in commands]


def test_commands_name_every_argument(make_yaml, tmp_path):
    """Whatever is in a path."""
    base = f"{tmp_path}/my model"
    source = "data.train=[{name: a, kind: sts, path: b.csv}]"
    words = words_of(
        make_yaml(tmp_path / "my runs"),
        f"model.base_model={base}",
        source,
        sts=["x y.csv", "z.csv"],
        files=("a.yaml", "b.yaml"),
    )
    run, results = (f"{tmp_path}/my runs/{name}/tiny" for name in ("runs", "results"))
    training = ["python", "scripts/train_pruning.py", "a.yaml", "b.yaml", source]
    extraction = ["python", "scripts/extract_pruned_model.py"]
    assert words[:4] == [
        training,
        [*extraction, run, f"{results}/pruned_model"],
        [*training, "stage=recover"],
        [*extraction, f"{run}-recovery", f"{results}/model"],
    ]
    evaluation, card, report = words[4:]
    assert evaluation[:3] == ["python", "scripts/evaluate_model.py", f"{results}/model"]
    assert evaluation[evaluation.index("--baseline") + 1] == base
    start = evaluation.index("--sts") + 1
    assert evaluation[start : start + 2] == ["x y.csv", "z.csv"]
    assert evaluation[evaluation.index("--output") + 1] == f"{results}/evaluation.json"
    written = ["--card", "--evaluation", f"{results}/evaluation.json"]
    assert card == ["python", "scripts/evaluate_model.py", f"{results}/model", *written]
    assert report == ["python", "scripts/write_report.py", results, "--run", run]


def test_prompts_are_given_to_the_evaluation():
    plan = EvaluationPlan(["a.csv"], prompts={"query": "q: ", "passage": ""})
    prompts = ["--query-prompt", "q: ", "--document-prompt", ""]
    assert plan.arguments() == ["--sts", "a.csv", *prompts, "--modes", "dense"]


@pytest.mark.parametrize("lines", [[], ["--lines", "-9:-2"], ["--lines=-9:-2"]])
def test_parallel_texts_of_a_command_line_are_those_of_the_next(lines):
    """A negative number at the beginning of a slice is no option."""
    words = [
        "--parallel",
        "x-{language}.txt",
        "de-en",
        "en-th",
        "--parallel",
        "y.{language}",
        "a-b",
    ]

    @opt.command(*opt.TASKS, check=opt.check_tasks, example="", slow=False)
    def read(args):
        plans.append(EvaluationPlan.of(args))

    plans = []
    for given in ([*words, *lines], words):
        assert read(given) == 0
        assert read(plans[-1].arguments()) == 0
        assert plans[-1] == plans[-2]
    assert plans[0].parallel == {"x-{language}.txt": ["de-en", "en-th"], "y.{language}": ["a-b"]}
    assert plans[0].lines == ("-9:-2" if lines else "-400:")
    with pytest.raises(SystemExit):
        read(["--parallel", "x-{language}.txt"])


def test_commands_of_an_overwriting_run_overwrite_too(tiny_yaml):
    """Or training starts anew and the models of the run before it are what is evaluated."""
    for words in words_of(tiny_yaml, "overwrite=true", sts=["a.csv"]):
        again = ("overwrite=true" in words) != ("--overwrite" in words)
        # The card is made to be written again.
        assert again != ("--card" in words), words
    assert not any("--overwrite" in words for words in words_of(tiny_yaml, sts=["a.csv"]))


def test_the_best_checkpoints_are_cut_if_they_are_kept(tiny_yaml, sts_csv, tmp_path):
    overrides = ["evaluation.keep_best=dev/cosine_spearman", "eval_interval=1ba"]
    words = words_of(tiny_yaml, *overrides, sts=["a.csv"])
    assert ["--best" in line for line in words] == [False, True, False, True] + 3 * [False]
    overrides.append("recovery.evaluation.keep_best=null")
    run_pipeline([str(tiny_yaml)], overrides, EvaluationPlan([str(sts_csv)]))
    results = tmp_path / "results" / "tiny"
    for model, name in (("pruned_model", "best-rank0.pt"), ("model", "latest-rank0.pt")):
        assert Path(read_json(results / model / "pruning.json")["checkpoint"]).name == name
    kept = read_json(results / "pruned_model" / "pruning.json")["kept"]["layer"]
    with np.load(results / "gates.npz") as gates:
        assert np.flatnonzero(gates["layer_kept"]).tolist() == kept


# What it refuses, before anything is made


@pytest.fixture
def refused(tiny_yaml, sts_csv, tmp_path):
    """Overrides to the error; neither a run nor results may have been made."""

    def run(*overrides: str, sts: list[Path] | None = None) -> Exception:
        before = tree(tmp_path)
        files = [sts_csv] if sts is None else sts
        with pytest.raises((ConfigError, OSError, ValueError)) as error:
            run_pipeline(
                [str(tiny_yaml)], list(overrides), EvaluationPlan([str(file) for file in files])
            )
        assert tree(tmp_path) == before
        return error.value

    return run


def test_sentence_pairs_that_are_refused(refused, sts_csv, tmp_path):
    broken, same = tmp_path / "broken.csv", tmp_path / "other" / sts_csv.name
    broken.write_text("a,b,1\na,b,n/a\n", encoding="utf-8")
    same.parent.mkdir()
    shutil.copy(sts_csv, same)
    for files, message in (
        ([broken], "broken.csv:2: score 'n/a' is not a number in [0, 5]"),
        ([sts_csv, tmp_path / "none.csv"], "none.csv: no such file"),
        # The second would take the place of the first in the evaluation.
        ([sts_csv, same], "are called tiny"),
        ([], "no task to evaluate on"),
    ):
        assert message in str(refused(sts=files))


def test_what_is_trained_on_judges_no_model(tiny_yaml, sts_csv, collection, tmp_path):
    own = f"recovery.data.eval=[{{name: dev, kind: sts, path: {sts_csv}}}]"
    for plan, more, name in (
        (EvaluationPlan([str(sts_csv)]), (), "tiny"),
        (EvaluationPlan(retrieval=[str(collection)]), (own,), "dev"),  # of the recovery alone
    ):
        overrides = ["data.on_trained_eval=error", "data.eval=[]", *more]
        message = f"^{name}: 40 of 40 pairs are trained on too, in train, such"
        with pytest.raises(ConfigError, match=message):
            run_pipeline([str(tiny_yaml)], overrides, plan)
    assert not (tmp_path / "runs").exists()


def test_parallel_lines_that_are_trained_on_judge_no_model(tiny_yaml, parallel_path, tmp_path):
    texts = f"{{name: t, kind: sentences, path: '{parallel_path.replace('{language}', '*')}'"
    for lines, plan in (
        ("", EvaluationPlan(parallel={parallel_path: ["de-en"]}, lines="-4:")),
        (
            ", lines: ':-4'",
            EvaluationPlan(parallel={parallel_path: ["th-de", "en-th"]}, lines="-5:"),
        ),
    ):
        only = "loss={sts_regression: 0.0}"
        overrides = [f"data.train=[{texts}{lines}}}]", "data.eval=[]", only]
        found = (
            r"^news-de-en: 8 of 8" if not lines else r"^news-th-de: 2 of 10 .*; news-en-th: 2 of"
        )
        with pytest.raises(
            ConfigError, match=f"{found}.* sentences are trained on too, in t, such"
        ):
            run_pipeline([str(tiny_yaml)], [*overrides, "data.on_trained_eval=error"], plan)
    assert not (tmp_path / "runs").exists()


LOSSES = ("sts_regression", "distillation_alignment", "distillation_similarity")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "model.l0_module=null",
            r"^model\.l0_module is null.*To fix, add a target, e\.g\. configs/",
        ),
        (
            "results_folder=FOLDER/tiny.yaml/inside",
            r"^results_folder .* cannot be written: .*is not a folder .*To fix, choose another",
        ),
        ("recovery.seedd=1", r"unknown key 'recovery\.seedd'"),
        ("model.l0_module.target_model.n_heads=2", "transformers could not load the result"),
        ("model.base_model=/no/where", "/no/where"),
        ("recovery.run_name=elsewhere", r"recovery\.run_name"),
        ("recovery.results_folder=elsewhere", r"recovery\.results_folder"),
        (" ".join(f"recovery.loss.{name}=0" for name in LOSSES), "loss"),
        ("recovery.teacher.base_model=/no/where", r"base_model '/no/where' is neither a folder"),
    ],
)
def test_configurations_that_are_refused(overrides, message, refused, tmp_path):
    error = refused(*overrides.replace("FOLDER", str(tmp_path)).split())
    assert re.search(message, str(error))
    if named := re.search(r"configs/\S+\.yaml", str(error)):
        assert (ROOT / named.group()).is_file()


@pytest.mark.parametrize(
    ("name", "overrides"), [("tiny", ()), ("tiny", ("overwrite=true",)), ("tiny-recovery", ())]
)
def test_a_run_folder_in_use_is_noticed_before_the_training(name, overrides, refused, tmp_path):
    mine = tmp_path / "runs" / name / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("ten years of work")
    assert f"{name} is in use and is kept" in str(refused(*overrides))


def test_a_dry_run_trains_nothing(tiny_yaml, sts_csv, tmp_path):
    with suppress(ConfigError):  # to refuse it is as good as to print the plan
        run_pipeline([str(tiny_yaml)], ["dry_run=true"], EvaluationPlan([str(sts_csv)]))
    assert not (tmp_path / "runs").exists()


# Results that are there already


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A results folder as a run leaves it."""
    results = tmp_path / "results" / "tiny"
    results.mkdir(parents=True)
    (results / "config.yaml").write_text("run_name: earlier")
    (results / "report.md").write_text("a month of GPU time")
    return results


@pytest.mark.parametrize(
    "override", ["model.l0_module.target_model.n_heads=2", "model.base_model=/no/where", NO_TARGET]
)
def test_a_refused_run_replaces_no_results(override, refused, earlier):
    refused("overwrite=true", override)
    assert (earlier / "report.md").read_text() == "a month of GPU time"


def test_only_results_are_replaced_and_only_if_asked_to(refused, earlier):
    error = refused()
    assert isinstance(error, FileExistsError)
    message = r"tiny holds results and is kept\. To fix, set another run_name, or .only if it holds"
    assert re.search(message, str(error))
    (earlier / "config.yaml").unlink()
    for asked in ("overwrite=true", "autoresume=true"):
        assert "only if it holds results of a run" in str(refused(asked))
    assert (earlier / "report.md").read_text() == "a month of GPU time"


@pytest.fixture
def start(tiny_yaml, sts_csv, monkeypatch):
    """Runs the pipeline up to the training."""

    def stop(config):
        raise InterruptedError(config.stage)

    monkeypatch.setattr(bge_pruning.train, "train", stop)

    def run(*overrides: str) -> None:
        with pytest.raises(InterruptedError, match="prune"):
            run_pipeline([str(tiny_yaml)], list(overrides), EvaluationPlan([str(sts_csv)]))

    return run


def test_overwriting_starts_from_an_empty_folder(start, earlier):
    start("overwrite=true")
    assert [path.name for path in earlier.iterdir()] == ["config.yaml"]
    assert load_config([earlier / "config.yaml"]).overwrite is True


def test_an_empty_folder_is_taken_and_a_stage_does_not_skip_the_pruning(start, tmp_path):
    results = tmp_path / "results" / "tiny"
    results.mkdir(parents=True)
    start("stage=recover")
    assert (results / "config.yaml").is_file()


# What the finished model is written as


def test_export_options_reach_the_finished_model_alone(tiny_yaml, sts_csv, tmp_path):
    (tmp_path / "texts.txt").write_text("the man plays a flute\n" * 2)
    export = [
        "export.keep_dimension=true",
        "export.colbert_dim=hidden",
        "export.onnx=true",
        "export.languages=[en,de]",
        f"export.keep_vocabulary_from=[{tmp_path / 'texts.txt'}]",
        "export.vocabulary_size=30",
    ]
    plan = EvaluationPlan([str(sts_csv)], modes=["dense", "colbert"])
    run_pipeline([str(tiny_yaml)], [*PIPELINE, *export], plan)
    results = tmp_path / "results" / "tiny"
    info = read_json(results / "model" / "pruning.json")
    assert info["projection"]["dimensions"] == 32
    assert info["multi_vector"]["colbert_dim"] == TARGET["hidden_size"]
    assert info["shape"]["vocab_size"] <= 30
    assert (results / "model" / "onnx" / "model.onnx").is_file()
    assert not (results / "pruned_model" / "onnx").exists()
    lines = (results / "commands.txt").read_text().splitlines()
    words = shlex.split(next(line for line in lines if line.endswith("--onnx")))
    given = "--colbert-dim hidden --keep-dimension --keep-vocabulary-from {} --languages en,de"
    expected = f"{given} --vocabulary-size 30 --onnx".format(tmp_path / "texts.txt")
    assert words[4:] == expected.split()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.colbert_dim=hidden", r"export\.colbert_dim is hidden, but .* no multi-vector h"),
        ("export.languages=[xx]", r"no corpus of xx is shipped"),
        ("export.int8_sts=a.csv", r"export\.int8_sts needs export\.onnx_int8\. To fix"),
        ("export.fit_texts=[a.txt]", r"export\.fit_texts needs export\.keep_dimension"),
        ("export.report_on=[a.txt]", r"report_on needs export\.keep_vocabulary_from or export\."),
        ("export.dtype=int4", r"export\.dtype 'int4' is not one of"),
        (
            "export={languages: [en], vocabulary_size: 100000}",
            r"export\.vocabulary_size 100000 is above the \d+ tokens of .*headless\. To fix",
        ),
        (
            "export={languages: [en], vocabulary_size: 3}",
            r"vocabulary_size 3 is below the \d+ tokens that must stay.* To fix, choose",
        ),
        ("export.vocabulary_size=0", r"export\.vocabulary_size 0 is not above 0"),
        ("recovery.loss.distillation_colbert=1", r"the loss trains colbert_vecs, and the model ha"),
    ],
)
def test_what_a_later_step_cannot_do_is_refused_before_the_training(
    override, message, tiny_yaml, sts_csv, model_folder, tmp_path
):
    headless = shutil.copytree(model_folder, tmp_path / "headless")
    (headless / "colbert_linear.pt").unlink()
    overrides = [*PIPELINE, f"model.base_model={headless}", override]
    with pytest.raises(ValueError, match=message):
        run_pipeline([str(tiny_yaml)], overrides, EvaluationPlan([str(sts_csv)]))
    assert not (tmp_path / "runs").exists()


# Several ranks


@pytest.fixture
def rank_calls(tiny_yaml, sts_csv, tmp_path, monkeypatch):
    """A rank to what it did: its meetings, trainings and writes, and what it returned."""
    from composer.utils import dist

    from bge_pruning.export import extract as export
    from bge_pruning.model_io import run_checkpoints as gate_file

    class Store:
        """One that the other rank has written to already."""

        def __init__(self, calls: list[str]) -> None:
            self.calls = calls

        def check(self, keys: list[str]) -> bool:
            return rank_watch.FAILURE not in keys

        def set(self, key: str, value: str) -> None:
            pass

        def add(self, key: str, count: int) -> int:
            if count and "inside" in key:
                self.calls.append("meeting")
            return 2

    def run(rank: int) -> tuple[list[str], dict]:
        calls = []
        with monkeypatch.context() as patch:
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            for name, number in here.items():
                patch.setenv(name, str(number))
            patch.setattr(rank_watch, "connect", lambda *_: Store(calls))
            patch.setattr(dist, "initialize_dist", lambda device, seconds: calls.append(seconds))
            patch.setattr(bge_pruning.train, "train", lambda c: calls.append(c.stage) or tmp_path)
            for module, name in (
                (export, "extract"),
                (gate_file, "write_gates"),
                (pipeline, "evaluate_model"),
                (pipeline, "_report"),
            ):
                patch.setattr(
                    module, name, lambda *_, name=name, **__: calls.append(name) or {"x": 1}
                )
            plan = EvaluationPlan([str(sts_csv)])
            return calls, run_pipeline([str(tiny_yaml)], ["dist_timeout=7"], plan)

    return run


def test_all_ranks_meet_at_the_same_places_and_one_writes(rank_calls, tmp_path):
    other, nothing = rank_calls(1)
    assert nothing is None
    assert not (tmp_path / "results").exists()
    assert [call for call in other if call != "meeting"] == [7.0, "prune", "recover"]
    first, returned = rank_calls(0)
    assert returned == {"x": 1}
    assert [call for call in first if call in (7.0, "meeting", "prune", "recover")] == other
    # What was extracted is there for every rank before the recovery reads it.
    assert "meeting" in first[first.index("extract") : first.index("recover")]


# Stopped and resumed


@pytest.mark.parametrize("step", [1, 6])  # of four steps of pruning and three of recovery
def test_a_pipeline_that_was_stopped_goes_on(
    step, finished_pipeline, make_yaml, sts_csv, tmp_path, monkeypatch, messages
):
    yaml, plan, begun = str(make_yaml(tmp_path)), EvaluationPlan([str(sts_csv)]), []
    original = DataCallback.batch_start

    def batch_start(self, state, logger):
        begun.append(state.timestamp.batch.value)
        if len(begun) == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, state, logger)

    with monkeypatch.context() as patch:
        patch.setattr(DataCallback, "batch_start", batch_start)
        message = "stopped by Ctrl-C after step .*, run the same command with autoresume=true"
        with pytest.raises(StoppedError, match=message):
            run_pipeline([yaml], PIPELINE, plan)
    assert len(begun) == step
    messages.clear()
    run_pipeline([yaml], [*PIPELINE, "autoresume=true"], plan)
    assert sum("gates were far from what is cut" in text for text in messages.messages) == 1
    results = tmp_path / "results" / "tiny"
    assert tree(results) == tree(finished_pipeline.results)
    models = [
        folder / "model" / "model.safetensors" for folder in (results, finished_pipeline.results)
    ]
    assert models[0].read_bytes() == models[1].read_bytes()


# Baselines


@pytest.mark.parametrize("method", ["layers", "magnitude"])
def test_a_baseline_runs_through_the_same_pipeline(method, tmp_path, make_yaml, sts_csv):
    """In as many steps as l0 has in all, to the same kind of folder, with commands that work.

    What each method keeps: test_baselines.py.
    """
    from safetensors.torch import load_file

    yaml, plan = str(make_yaml(tmp_path)), EvaluationPlan([str(sts_csv)])
    evaluation = run_pipeline([yaml], [*PIPELINE, f"method={method}"], plan)
    results = tmp_path / "results" / "tiny"
    info = read_json(results / "pruning.json")
    assert (info["method"], info["batches"]) == (method, {"recover": 7})  # 4 + 3 of l0
    assert info == read_json(results / "model" / "pruning.json")
    assert info["kept"] == read_json(results / "pruned_model" / "pruning.json")["kept"]
    shape = TARGET if method != "layers" else {"num_hidden_layers": 1, "hidden_size": 32}
    assert {key: info["shape"][key] for key in shape} == shape
    assert {"metrics-recovery.jsonl", "report.html", "evaluation.json"} <= tree(results)
    assert not {"gates.npz", "metrics.jsonl"} & tree(results)
    assert not (tmp_path / "runs" / "tiny").exists()
    assert evaluation.tasks[0].also["pruned, before recovery"] is not None
    assert "No axis was pruned by gates." in (results / "report.md").read_text()
    card = (results / "model" / "README.md").read_text()
    assert "Trained for 7 steps of recovery." in card
    if method == "layers":
        return
    commands = (results / "commands.txt").read_text().splitlines()
    weights = load_file(results / "model" / "model.safetensors")
    shutil.move(tmp_path / "results", tmp_path / "first")
    shutil.move(tmp_path / "runs", tmp_path / "runs-first")
    run_commands(commands)
    found = load_file(results / "model" / "model.safetensors")
    assert weights.keys() == found.keys()
    assert all(torch.equal(weights[name], found[name]) for name in weights)
    assert tree(results) >= {"report.md", "pruned_model/pruning.json", "evaluation.json"}
