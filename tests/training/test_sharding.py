"""Sharded training on one rank, and what it refuses. On many: reliability/test_ranks.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bge_pruning.config.command_checks import check_checkpoint_kind, check_objective
from bge_pruning.config.load import ConfigError, load_config
from bge_pruning.model_io.checkpoint import find_checkpoint, load_state
from bge_pruning.training.sharding import measure_gradient_scale

STEPS = ("max_duration=2ba", "save_interval=2ba", "data.eval=[]")
FSDP = "parallelism.fsdp=true"
quiet = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    key = "loss/train/total"
    return [row["metrics"][key] for row in rows if key in row["metrics"]]


@quiet
@pytest.mark.parametrize("state_dict", ["full", "sharded"])
def test_a_sharded_model_trains_as_a_whole_one(state_dict, train_tiny, tmp_path, assert_same):
    whole = train_tiny(tmp_path / "whole", *STEPS)
    sharding = (FSDP, f"parallelism.state_dict={state_dict}")
    sharded = train_tiny(tmp_path / "sharded", *STEPS, *sharding)
    assert losses(sharded) == pytest.approx(losses(whole), abs=1e-6)
    found = find_checkpoint(sharded)
    assert found.is_dir() == (state_dict == "sharded")
    states = [load_state(path)["state"]["model"] for path in (find_checkpoint(whole), found)]
    assert_same(*states, atol=1e-6)
    other = {"full": (FSDP, "parallelism.state_dict=sharded"), "sharded": ()}[state_dict]
    with pytest.raises(ConfigError, match="parallelism.state_dict"):
        train_tiny(tmp_path / "sharded", *STEPS, *other, "autoresume=true")


def test_a_gradient_is_compared_with_the_mean(train_tiny, tmp_path):
    from composer.utils import dist

    dist.initialize_dist("cpu")
    assert measure_gradient_scale("cpu") == 1.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallelism.sharding=half"], "parallelism.sharding 'half' is not one of"),
        (["parallelism.state_dict=none"], "parallelism.state_dict 'none' is not one of"),
        (["dist_timeout=0"], "dist_timeout 0.0 is not above 0"),
        (["parallelism.state_dict=sharded"], "state_dict=sharded needs a sharded model"),
        (
            [FSDP, "parallelism.state_dict=sharded", "evaluation.keep_best=dev/cosine_spearman"],
            "evaluation.keep_best writes one file",
        ),
        ([FSDP, "model.compile=true"], "fsdp does not work with model.compile=true"),
        ([FSDP, "precision=amp_fp16"], "fsdp does not work with precision=amp_fp16"),
    ],
)
def test_refused(overrides, message, tiny_yaml):
    with pytest.raises(ConfigError, match=f"{message}.*To fix, "):
        load_config([tiny_yaml], overrides)


def test_pieces_of_a_batch_that_is_compared_are_refused(tiny_yaml):
    pieces = [FSDP, "device_train_microbatch_size=2"]
    with pytest.raises(ConfigError, match=r"compares the texts of a batch\. To fix, leave it out"):
        check_objective(load_config([tiny_yaml], pieces))
    check_objective(load_config([tiny_yaml], [*pieces, "loss.distillation_similarity=0"]))
    check_objective(load_config([tiny_yaml], [pieces[1]]))


def test_a_run_does_not_go_on_from_the_other_kind_of_checkpoint(tiny_yaml, tmp_path):
    config = load_config([tiny_yaml])
    check_checkpoint_kind(config, None)
    check_checkpoint_kind(config, tmp_path / "ba2-rank0.pt")
    with pytest.raises(
        ConfigError, match=r"is a sharded checkpoint.*=sharded and parallelism.fsdp"
    ):
        check_checkpoint_kind(config, tmp_path)
