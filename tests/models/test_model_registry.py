"""Models by name."""

import re

import pytest

from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.model_registry import build_composer_model
from bge_pruning.models.objective import LossWeights


def test_arguments_reach_the_model(build_model, tiny_shape):
    backbone, heads = build_model(tiny_shape)
    given = {"loss_weights": LossWeights(sts_regression=1.0), "eval_target_model": False}
    given |= {"backbone": backbone, "heads": heads, "l0_module": None}
    model = build_composer_model("composer_bge_m3", **given)
    assert type(model) is ComposerBGEM3
    assert all(getattr(model, name) is value for name, value in given.items())


@pytest.mark.parametrize("name", ["", "Composer_BGE_M3", "composer_bge_m3 ", "bert"])
def test_an_unknown_name_is_refused(name):
    message = f"model.name '{name}' is not one of ['composer_bge_m3']. To fix, choose one."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_composer_model(name)
