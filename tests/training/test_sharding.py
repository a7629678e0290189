"""Sharded training on one rank. On many: reliability/test_ranks.py."""

import pytest
from composer.utils import dist

from bge_pruning.config.load import ConfigError
from bge_pruning.model_io.checkpoint import find_checkpoint, load_state
from bge_pruning.training.sharding import measure_gradient_scale
from tests.common.trainings import losses

STEPS = ("max_duration=2ba", "save_interval=2ba", "data.eval=[]")
FSDP = "parallelism.fsdp=true"
quiet = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


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


def test_a_gradient_is_compared_with_the_mean():
    dist.initialize_dist("cpu")
    assert measure_gradient_scale("cpu") == 1.0
