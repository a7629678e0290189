"""Losses, data and evaluations that do not fit each other."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bge_pruning.config.command_checks import check_objective
from bge_pruning.config.load import Config, ConfigError, load_config

ROOT = Path(__file__).parents[2]
NO_TEACHER = ("loss.distillation_alignment=0", "loss.distillation_similarity=0")


@pytest.fixture
def configure(tiny_yaml) -> Callable[..., Config]:
    """A function that makes the tiny configuration with overrides."""
    return lambda *overrides: load_config([tiny_yaml], overrides)


def source(*kinds: str) -> str:
    sources = ", ".join(f"{{name: {k}, kind: {k}, path: nowhere}}" for k in kinds)
    return f"data.train=[{sources}]"


ZERO = "loss={sts_regression: 0, distillation_alignment: 0, distillation_similarity: 0}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=[]"], "data.train is empty. To fix, add configs/training/sts_only.yaml."),
        ([source("sts", "sts")], "two sources of data.train are called sts. To fix, rename one."),
        (
            [source("sts", "sts").replace("train", "eval")],
            "two sources of data.eval are called sts. To fix, rename one.",
        ),
        (
            [source("sts", "sentences").replace("}]", ", weight: 0.5}]")],
            "only sentences of data.train have a weight. To fix, give one to every source, or to "
            "none.",
        ),
        (
            ["data.adapt_weights_interval=2ba", "data.num_workers=1"],
            "data.adapt_weights_interval needs data.num_workers=0: workers load batches before",
        ),
        (
            ["data.adapt_weights_interval=2ba", "model.l0_module=null"],
            "data.adapt_weights_interval follows what pruning costs, and nothing is pruned",
        ),
        (
            ["loss.distillation_hidden=1"],
            "loss.distillation_hidden needs the teacher's hidden states, which are too many to "
            "cache. To fix, set teacher.cache=false.",
        ),
        (
            [source("sts", "beir"), ZERO.replace("sts_regression: 0", "sts_regression: 1")],
            "no loss applies to data source 'beir' of kind beir. To fix, set a weight under loss",
        ),
        (
            [source("sts").replace("}]", ", mined_negatives: 5}]")],
            "negatives of data source 'sts' need queries with passages, not kind sts. To fix",
        ),
        (
            [source("sts", "beir").replace("}]", ", mined_negatives: 5}]")],
            "data source 'beir' mines 5 negatives a query and uses none. To fix, set negatives",
        ),
        (
            [source("sts", "contrastive"), "loss.score_distillation=1"],
            "loss.score_distillation compares the passages of a row, and data source "
            "'contrastive' has 1 without negatives. To fix, set negatives above 0.",
        ),
        ([ZERO], "all weights under loss are 0. To fix, set e.g. loss.sts_regression=1."),
        (
            [source("sentences")],
            "loss.sts_regression needs data.train of kind sts. To fix, set it to 0 or add such "
            "data.",
        ),
    ],
)
def test_objectives_that_are_refused(overrides, message, configure):
    with pytest.raises(ConfigError) as error:
        check_objective(configure(*overrides))
    assert message in str(error.value)


def test_the_file_that_a_message_names_is_there():
    assert (ROOT / "configs/training/sts_only.yaml").is_file()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        NO_TEACHER,
        [source("sentences", "mteb"), "loss.sts_regression=0"],
        [source("sts", "contrastive", "beir"), "loss.sts_regression=0"],
        ["device_train_microbatch_size=8"],
        ["device_train_microbatch_size=64"],
        ["device_train_microbatch_size=1", "loss.distillation_similarity=0"],
    ],
)
def test_objectives_that_are_accepted(overrides, configure):
    check_objective(configure(*overrides))


EVALUATED = "dev/cosine_spearman, x/ndcg_at_10, x/mrr_at_10, x/recall_at_100, x/map_at_100"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [source("sentences").replace("train", "eval")],
            "data.eval 'sentences' is of kind sentences; sts, beir, mteb can be evaluated. To fix",
        ),
        (
            [source("contrastive").replace("train", "eval")],
            "data.eval 'contrastive' is of kind contrastive; sts, beir, mteb can be evaluated.",
        ),
        (["evaluation.modes=[]"], "evaluation.modes is empty. To fix, write e.g. [dense]."),
        (
            ["evaluation.modes=[dense, late]"],
            "evaluation.modes[1] 'late' is not one of ('dense', 'sparse', 'colbert', "
            "'dense+sparse', 'all'). To fix, choose one.",
        ),
        (
            ["evaluation.keep_best=eval/dev/cosine_spearman"],
            "evaluation.keep_best 'eval/dev/cosine_spearman' is not evaluated. To fix, choose one "
            "of dev/cosine_spearman.",
        ),
        (
            [
                "data.eval=[{name: dev, kind: sts, path: a}, {name: x, kind: beir, path: b}]",
                "evaluation.keep_best=x/ndcg_at_5",
            ],
            f"evaluation.keep_best 'x/ndcg_at_5' is not evaluated. To fix, choose one of "
            f"{EVALUATED}.",
        ),
        (
            [
                "data.eval=[{name: x, kind: mteb, path: b}]",
                "evaluation.modes=[sparse]",
                "evaluation.keep_best=x/ndcg_at_10",
            ],
            "To fix, choose one of x/sparse_ndcg_at_10, x/sparse_mrr_at_10",
        ),
        (
            ["data.eval=[]", "evaluation.keep_best=dev/cosine_spearman"],
            "is not evaluated. To fix, choose one of the scores of data.eval, which is empty.",
        ),
        (
            ["evaluation.keep_best=dev/cosine_spearman", "model.l0_module.eval_target_model=false"],
            "evaluation.keep_best would keep the model before anything is pruned: with "
            "model.l0_module.eval_target_model=false it is evaluated as large as it still is. To "
            "fix, set eval_target_model=true, or keep_best=null.",
        ),
    ],
)
def test_evaluations_that_are_refused(overrides, message, configure):
    with pytest.raises(ConfigError) as error:
        check_objective(configure(*overrides))
    assert message in str(error.value)


def test_a_best_checkpoint_of_every_kind_is_accepted(configure):
    data = "data.eval=[{name: x, kind: beir, path: a}, {name: y, kind: sts, path: a}]"
    modes = "evaluation.modes=[dense, dense+sparse]"
    for key in ("y/cosine_spearman", "x/recall_at_100", "x/dense+sparse_map_at_100"):
        check_objective(configure(data, modes, f"evaluation.keep_best={key}"))
    check_objective(configure("model.l0_module=null", "evaluation.keep_best=dev/cosine_spearman"))
