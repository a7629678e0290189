"""Many ranks: the same numbers as one process, and an end when one of them fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bge_pruning.config.load import load_config, pruned_model_folder
from bge_pruning.export.extract import extract
from bge_pruning.model_io.checkpoint import find_checkpoint, load_state
from bge_pruning.workflows.baselines import cut_baseline
from tests.common.trainings import logged, losses, read_metrics

ROOT = Path(__file__).parents[2]
COMPOSER = str(Path(sys.executable).with_name("composer"))
DRIVER = "tests/reliability/rank_driver.py"
pytestmark = [
    pytest.mark.reliability,
    pytest.mark.filterwarnings("ignore:The warmup duration is 0:UserWarning"),
]

# The epsilon keeps rounding small where a gradient is almost 0; nothing is clipped, so that a
# gradient of the wrong size is seen.
STEPS = (
    "max_duration=5ba",
    "optimizer.eps=1e-3",
    "optimizer.max_grad_norm=0",
    "scheduler.t_warmup=0ba",
    "data.eval=[]",
)
MIXED = (
    "data.train=[{{name: p, kind: sts, path: {csv}}},"
    " {{name: q, kind: contrastive, path: {jsonl}, negatives: 1}}]",
    "loss={{sts_regression: 0.0, cosent: 0.1, distillation_alignment: 0.5,"
    " distillation_similarity: 0.5, distillation_sparse: 0.1, contrastive: 1.0,"
    " self_distillation: 0.5, temperature: 0.1, learn_temperature: true}}",
)
# Every loss; and one that a source has no data for, though it has passages.
EVERY = (
    "data.train=[{{name: p, kind: sts, path: {csv}}},"
    " {{name: q, kind: contrastive, path: {jsonl}, negatives: 1}},"
    " {{name: s, kind: contrastive, path: {scored}, negatives: 1}}]",
    "teacher.cache=false",
)
ALL_LOSSES = (
    *EVERY,
    "loss={{sts_regression: 0.5, cosent: 0.1, distillation_alignment: 0.5,"
    " distillation_similarity: 0.5, distillation_sparse: 0.1, distillation_colbert: 0.5,"
    " distillation_hidden: 0.5, contrastive: 1.0, self_distillation: 0.5, score_distillation: 0.5,"
    " distillation_scores: 0.5, teacher_scores_in_batch: true,"
    " contrastive_outputs: [dense, sparse, colbert], temperature: 0.1, learn_temperature: true}}",
)
ONE_SCORED = (
    *EVERY,
    "loss={{distillation_alignment: 0.5, score_distillation: 1.0, temperature: 0.1,"
    " contrastive_outputs: [dense, sparse, colbert]}}",
)
DECIDED = "model.l0_module.binarization=5"
PIECES = "device_train_microbatch_size={size}"
MEMORY = ("model.activation_checkpointing=true", "model.freeze_embeddings=true")
# By name: ranks, what one process is told too, and what the ranks alone are told.
RUNS = {
    "4 ranks": (4, MIXED, ()),
    "2 ranks, every loss": (2, ALL_LOSSES, ()),
    "2 ranks, scores in one source": (2, ONE_SCORED, ()),
    "2 ranks sharded, scores in one source": (2, ONE_SCORED, ("parallelism.fsdp=true",)),
    "4 ranks in pieces": (4, (*MIXED, PIECES.format(size=1)), ()),
    "2 ranks sharded": (2, MIXED, ("parallelism.fsdp=true",)),
    "4 ranks sharded": (4, (*MIXED, *MEMORY), ("parallelism.fsdp=true",)),
    "2 ranks sharded and clipped": (
        2,
        (*MIXED, "optimizer.max_grad_norm=1.0"),
        ("parallelism.fsdp=true", "parallelism.sharding=gradients"),
    ),
    "2 ranks sharded, microbatches": (
        2,
        (PIECES.format(size=2), "loss.distillation_similarity=0"),
        ("parallelism.fsdp=true",),
    ),
    "2 ranks sharded, gates in an order": (
        2,
        (*MIXED, "model.l0_module.init_order=reconstruction", DECIDED),
        ("parallelism.fsdp=true",),
    ),
    "2 ranks sharded files": (
        2,
        MIXED,
        ("parallelism.fsdp=true", "parallelism.state_dict=sharded"),
    ),
}


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PORT = 29_650


def launch(ranks: int, fault: str, yaml: Path, *overrides: str, trace: Path | None = None):
    environment = dict(ENVIRONMENT)
    if trace is not None:
        environment["RANK_TRACE"] = str(trace)
    command = [COMPOSER, "-n", str(ranks), DRIVER, fault, str(yaml), *overrides]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = load_state(find_checkpoint(folder))["state"]["model"]
    # DistributedDataParallel may prefix every name.
    return {re.sub(r"^module\.", "", name): value for name, value in state.items()}


@pytest.fixture(scope="module")
def fill(contrastive_jsonl, sts_csv, tmp_path_factory):
    """A function that writes the paths of the data into overrides."""
    rows = [json.loads(line) for line in contrastive_jsonl.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["pos_scores"] = [2.0 + number % 3] * len(row["pos"])
        row["neg_scores"] = [1.0 - number % 2] * len(row["neg"])
    scored = tmp_path_factory.mktemp("scored") / "scored.jsonl"
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"jsonl": contrastive_jsonl, "csv": sts_csv, "scored": scored}
    return lambda texts: [text.format(**paths) for text in texts]


@pytest.fixture(scope="module")
def train_on_ranks(make_yaml, tmp_path_factory, fill):
    """A function that trains on many ranks, once: the run folder, and hashes of gates by rank."""
    done = {}

    def run(name: str):
        if name not in done:
            ranks, overrides, alone = RUNS[name]
            folder = tmp_path_factory.mktemp("ranks")
            trace, given = folder / "gates", fill(overrides)
            result = launch(ranks, "none", make_yaml(folder), *STEPS, *given, *alone, trace=trace)
            assert result.returncode == 0, result.stdout + result.stderr
            hashes = [Path(f"{trace}{rank}").read_text().splitlines() for rank in range(ranks)]
            done[name] = folder / "runs" / "tiny", hashes
        return done[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_the_gates_are_the_same_on_all_ranks_at_every_step(name, train_on_ranks, summary):
    _, hashes = train_on_ranks(name)
    assert all(lines == hashes[0] for lines in hashes)
    assert len({line.split()[0] for line in hashes[0]}) == 5
    assert len(set(hashes[0])) >= 5
    summary["ranks compared"] += len(hashes)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_equal_one_process(
    name, train_on_ranks, tmp_path, train_tiny, assert_same, fill, summary
):
    one = train_tiny(tmp_path, *STEPS, *fill(RUNS[name][1]))
    many, _ = train_on_ranks(name)
    for key in ("loss/train/total", "loss/train/lagrangian", "pruning/lambda_1/hidden"):
        assert len(logged(one, key)) == 5
        assert logged(many, key) == pytest.approx(logged(one, key), abs=1e-5, rel=1e-5)
    if "score_distillation" in str(RUNS[name][1]):  # the sources with and without scores
        assert 0 < len(logged(many, "loss/train/score_distillation")) < 5
    assert_same(weights(one), weights(many), atol=2e-5)
    summary["ranks compared"] += RUNS[name][0]


def test_a_sharded_run_is_extracted_as_any_other(train_on_ranks, tmp_path, summary):
    """masked == extracted is checked by the extraction itself."""
    files = []
    for name in ("2 ranks sharded", "2 ranks sharded files"):
        folder, _ = train_on_ranks(name)
        extract(folder, tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    summary["ranks compared"] += 4


@pytest.mark.parametrize("state_dict", ["full", "sharded"])
def test_a_sharded_run_goes_on_where_it_was_killed(
    state_dict, train_on_ranks, make_yaml, tmp_path, assert_same, fill, summary
):
    name = "2 ranks sharded" + (" files" if state_dict == "sharded" else "")
    whole, _ = train_on_ranks(name)
    arguments = [*STEPS, *fill(MIXED), *RUNS[name][2], "save_interval=1ba", "autoresume=true"]
    yaml = make_yaml(tmp_path)
    # The gates are drawn once a step.
    killed = launch(2, "is killed:in step 4:1", yaml, *arguments)
    assert killed.returncode != 0
    again = launch(2, "none", yaml, *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    folder = tmp_path / "runs" / "tiny"
    assert losses(folder)[-2:] == losses(whole)[-2:]
    assert_same(weights(whole), weights(folder))
    summary["ranks compared"] += 2


@pytest.mark.parametrize(("rows", "sharded"), [(39, False), (37, True)])
def test_four_ranks_evaluate_as_one(
    rows, sharded, make_yaml, train_tiny, tmp_path, sts_csv, write_collection, summary
):
    """Pairs and passages that do not divide: none is lost, none counts twice."""
    odd = tmp_path / "odd.csv"
    odd.write_text("".join(sts_csv.read_text().splitlines(keepends=True)[:rows]))
    collection = write_collection(tmp_path / "docs", rows - 10)
    overrides = [
        *STEPS[:-1],
        "max_duration=2ba",
        f"data.eval=[{{name: dev, kind: sts, path: {odd}}},"
        f" {{name: docs, kind: beir, path: {collection}, split: test}}]",
        "evaluation.modes=[dense, all]",
        "evaluation.keep_best=docs/ndcg_at_10",
    ]
    alone = ["parallelism.fsdp=true"] if sharded else []
    result = launch(4, "none", make_yaml(tmp_path / "four"), *overrides, *alone)
    assert result.returncode == 0, result.stdout + result.stderr
    one = train_tiny(tmp_path / "one", *overrides)
    four = tmp_path / "four" / "runs" / "tiny"
    keys = {key for row in read_metrics(one) for key in row["metrics"] if key.startswith("eval/")}
    assert len(keys) > 8
    for key in keys - {"eval/seconds"}:
        assert logged(four, key) == pytest.approx(logged(one, key), abs=1e-6), key
    summary["ranks compared"] += 4


MESSAGE = "the disk of this rank is on fire"
FAULTS = {
    "raises:in a step:1": f"error (rank 1): {MESSAGE}",
    "raises:in a step:0": f"error: {MESSAGE}",
    "raises:reading data:1": f"error (rank 1): {MESSAGE}",
    "raises:making a cache:0": f"error: {MESSAGE}",
    "is killed:in a step:1": "Rank 1 crashed with exit code -9",
    "is killed:in a step:0": "Rank 0 crashed with exit code -9",
    "is killed:making a cache:0": "Rank 0 crashed with exit code -9",
    "hangs:in a step:1": "error: ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_fails_ends_the_run_with_its_error(fault, make_yaml, tmp_path, summary):
    begun = time.monotonic()
    options = ("data.eval=[]", "dist_timeout=10", "teacher.cache=true")
    result = launch(2, fault, make_yaml(tmp_path), *options)
    assert result.returncode != 0
    assert FAULTS[fault] in result.stderr, result.stdout + result.stderr
    # The launcher gives the others 30 seconds; starting takes longer on a busy machine.
    assert time.monotonic() - begun < 200
    summary["ranks that failed"] += 1


def launch_two_nodes(port: int, fault: str, yaml: Path, *overrides: str) -> list[tuple[int, str]]:
    """Two launchers of one rank each, as two machines have: exit codes and standard errors."""
    nodes = []
    for node in ("0", "1"):
        options = ["--world_size", "2", "--node_rank", node, "--master_addr", "127.0.0.1"]
        command = [COMPOSER, *options, "--master_port", str(port), "-n", "1", DRIVER, fault]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command += [str(yaml), *overrides]
        nodes.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes))
    try:
        ends = [process.communicate(timeout=300) for process in nodes]
    finally:
        for process in nodes:
            process.terminate()
    return [(process.returncode, end[1]) for process, end in zip(nodes, ends, strict=True)]


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_recover_from_the_same_refitted_model(
    sharded, make_yaml, train_tiny, tmp_path, assert_same, summary
):
    cut = load_config([make_yaml(tmp_path)], ["method=activation"])
    cut_baseline(cut, pruned_model_folder(cut))
    given = [*STEPS, "method=activation", "stage=recover", "teacher.refit_texts=60"]
    many = launch(
        2, "none", make_yaml(tmp_path), *given, f"parallelism.fsdp={str(sharded).lower()}"
    )
    assert many.returncode == 0, many.stdout + many.stderr
    found = weights(tmp_path / "runs" / "tiny-recovery")
    one = train_tiny(tmp_path, *given, "overwrite=true")
    assert_same(weights(one), found, atol=2e-5)
    summary["ranks compared"] += 2


def test_two_nodes_equal_one_process(make_yaml, train_tiny, tmp_path, assert_same, summary):
    nodes = launch_two_nodes(PORT, "none", make_yaml(tmp_path / "two"), *STEPS)
    assert [code for code, _ in nodes] == [0, 0], nodes
    one = train_tiny(tmp_path / "one", *STEPS)
    assert_same(weights(one), weights(tmp_path / "two" / "runs" / "tiny"), atol=1e-5)
    summary["ranks compared"] += 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_whose_rank_fails_ends_the_other(rank, make_yaml, tmp_path, summary):
    fault = f"raises:in a step:{rank}"
    nodes = launch_two_nodes(PORT + 1 + rank, fault, make_yaml(tmp_path), "data.eval=[]")
    assert all(code != 0 for code, _ in nodes), nodes
    assert f"error: {MESSAGE}" in nodes[0][1] or f"error (rank 1): {MESSAGE}" in nodes[0][1]
    summary["ranks that failed"] += 1


SLOW = {
    "training": (("making a cache", "calibrating", "recording", "reporting"), ()),
    "pipeline": (("extracting", "evaluating"), ("--sts", "{csv}")),
    "pipeline of a baseline": (("choosing",), ("method=magnitude", "--sts", "{csv}")),
}


@pytest.mark.parametrize("name", SLOW)
def test_the_first_rank_may_take_longer_than_the_time_out(name, make_yaml, tmp_path, fill, summary):
    places, overrides = SLOW[name]
    slow = ",".join(f"is slow:{place}:0" for place in places)
    given = ["data.eval=[]", "dist_timeout=5", *fill(overrides)]
    if name == "training":
        given += ["model.l0_module.init_order=reconstruction", "teacher.cache=true"]
    begun = time.monotonic()
    result = launch(2, slow, make_yaml(tmp_path), *given)
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - begun > 8 * len(places)
    summary["ranks compared"] += 2


def test_a_pipeline_ends_if_its_first_rank_fails_alone(make_yaml, tmp_path, fill, summary):
    given = ["data.eval=[]", *fill(["--sts", "{csv}"])]
    result = launch(2, "raises:extracting:0", make_yaml(tmp_path), *given)
    assert result.returncode != 0
    assert f"error: {MESSAGE}" in result.stderr, result.stdout + result.stderr
    summary["ranks that failed"] += 1


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_train_the_first_ones_model_whatever_their_own_is(
    sharded, make_yaml, train_tiny, tmp_path, assert_same, summary
):
    """Weights and gates of rank 1 are others, as on another machine."""
    trace, alone = tmp_path / "gates", ["parallelism.fsdp=true"] if sharded else []
    given = [*STEPS, "model.l0_module.init_order=reconstruction"]
    many = launch(2, "differs:building:1", make_yaml(tmp_path / "two"), *given, *alone, trace=trace)
    assert many.returncode == 0, many.stdout + many.stderr
    first, second = (Path(f"{trace}{rank}").read_text() for rank in (0, 1))
    assert first == second
    one = train_tiny(tmp_path / "one", *given)
    assert_same(weights(one), weights(tmp_path / "two" / "runs" / "tiny"), atol=2e-5)
    summary["ranks compared"] += 2


@pytest.mark.parametrize("launcher", ["python", "composer"])
def test_control_c_saves_the_step_and_the_run_goes_on(launcher, make_yaml, tmp_path, summary):
    """A terminal sends the signal to the launcher, the ranks and what loads their data."""
    start = [COMPOSER, "-n", "2"] if launcher == "composer" else [sys.executable]
    command = [*start, "-m", "bge_pruning.train", str(make_yaml(tmp_path))]
    command += ["max_duration=80ba", "data.num_workers=1", "data.eval=[]"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    lines, options = [], {"cwd": ROOT, "env": ENVIRONMENT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes, **options) as run:
        for line in run.stdout:
            lines.append(line)
            if "step 3/80" in line:
                os.killpg(run.pid, signal.SIGINT)
    output = "".join(lines)
    assert run.returncode == 130, output
    assert output.count("Ctrl-C: the step is finished and saved, then the run ends.") == 1, output
    stopped = (
        r"error: stopped by Ctrl-C after step (\d+), which is saved\. To resume, run the same "
    )
    (step,) = re.findall(stopped + r"command with autoresume=true\.", output)
    # Composer's launcher prints the trace of its own signal.
    assert output.count("Traceback") == (launcher == "composer"), output
    command.append("autoresume=true")
    again = subprocess.run(command, capture_output=True, **options)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"training resumes after step {step}, to step 80" in again.stderr
    assert len(losses(tmp_path / "runs" / "tiny")) == 80
    summary["ranks compared"] += 2
