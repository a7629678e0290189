"""Losses, data and evaluations that do not fit each other."""

import re
from pathlib import Path

import pytest

from bge_pruning.config.command_checks import check_checkpoint_kind, check_objective
from bge_pruning.config.load import ConfigError, load_config

ROOT = Path(__file__).parents[2]
TEN = "max_duration=10ba"
NO_TEACHER = "loss.distillation_alignment=0 && loss.distillation_similarity=0"
ZERO = "loss={sts_regression: 0, distillation_alignment: 0, distillation_similarity: 0}"
ONE = ZERO.replace("sts_regression: 0", "sts_regression: 1")
EVALUATED = "dev/cosine_spearman, x/ndcg_at_10, x/mrr_at_10, x/recall_at_100, x/map_at_100"
COLLECTION = "data.eval=[{name: x, kind: mteb, path: b}]"
STREAM = "name: s, kind: sentences, path: hf://a/b, streaming: true"
PIECES = "parallelism.fsdp=true && device_train_microbatch_size=2"


@pytest.fixture
def check(tiny_yaml):
    """A function that checks the tiny configuration with overrides, separated by ``&&``."""
    return lambda text: check_objective(load_config([tiny_yaml], text.split(" && ") * bool(text)))


def sources(*kinds: str, last: str = "", part: str = "train") -> str:
    """The override that names a source of each kind, the last one with more keys."""
    each = ", ".join(f"{{name: {k}, kind: {k}, path: nowhere}}" for k in kinds)
    return f"data.{part}=[{each.removesuffix('}')}, {last}}}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.train=[]", "data.train is empty. To fix, add configs/training/sts_only.yaml."),
        (sources("sts", "sts"), "two sources of data.train are called sts. To fix, rename one."),
        (
            sources("sts", "sts", part="eval"),
            "two sources of data.eval are called sts. To fix, rename one.",
        ),
        (
            sources("sts", "sentences", last="weight: 0.5"),
            "only sentences of data.train have a weight. To fix, give one to every source, or to ",
        ),
        (
            sources("sts", last="columns: {sentense1: a}"),
            "columns of data source 'sts' names sentense1; kind sts has sentence1, sentence2, sc",
        ),
        (
            f"data.train=[{{{STREAM}}}, {{name: t, kind: sentences, path: a.txt}}]",
            "data source 's' is a stream without weight and rows, so nobody knows how much of it",
        ),
        (
            f"data.train=[{{{STREAM}}}] && max_duration=2ep",
            "data source 's' is a stream, which has no end, and max_duration is 2ep",
        ),
        (
            f"data.eval=[{{{STREAM}}}]",
            "s of data.eval is streaming, and evaluation reads all rows",
        ),
        (
            "data.adapt_weights_interval=2ba && data.num_workers=1",
            "data.adapt_weights_interval needs data.num_workers=0: workers load batches before",
        ),
        (
            "data.adapt_weights_interval=2ba && model.l0_module=null",
            "data.adapt_weights_interval follows what pruning costs, and nothing is pruned",
        ),
        *(
            (f"{sources('sts', 'sentences')} && data.stages=[{stages}] && {more}", message)
            for stages, more, message in (
                ("{until: 1dur, weights: {stz: 1}}", TEN, "mean 'sts'?"),
                (
                    "{until: 1dur, weights: {x: 1}}",
                    TEN,
                    "names 'x', no source of data.train: choose from sts, sentences.",
                ),
                (
                    "{steps: 9}, {until: 1dur, weights: {sts: 0}}",
                    TEN,
                    "data.stages[1].weights {'sts': 0.0} are below 0, or all 0. To fix, give",
                ),
                (
                    "{until: 1dur, weights: {sts: 1}}",
                    TEN,
                    "'sentences' has a weight in none of data.stages. To fix, give it one, or",
                ),
                ("{until: 1dur}", "data.adapt_weights_interval=2ba", "weights that data.stages sa"),
            )
        ),
        (
            f"model.freeze_encoder=true && stage=recover && teacher.refit_texts=8 && {NO_TEACHER}",
            "model.freeze_encoder trains the heads on queries with passages, and has no use for "
            "teacher.refit_texts. To fix, leave it out, or set model.freeze_encoder=false.",
        ),
        (
            "loss.distillation_hidden=1 && teacher.cache=true",
            "loss.distillation_hidden needs the teacher's hidden states, which are too many to "
            "cache. To fix, leave teacher.cache out, or set it to false.",
        ),
        (
            f"{sources('sts', 'beir')} && {ONE}",
            "no loss applies to data source 'beir' of kind beir. To fix, set a weight under loss",
        ),
        (
            sources("sts", last="mined_negatives: 5"),
            "negatives of data source 'sts' need queries with passages, not kind sts. To fix",
        ),
        (
            sources("sts", last="in_batch_negatives: false"),
            "negatives of data source 'sts' need queries with passages, not kind sts. To fix",
        ),
        (
            sources("sts", "beir", last="in_batch_negatives: false"),
            "data source 'beir' has no negatives at all: in_batch_negatives is false and negatives",
        ),
        (
            sources("sts", "beir", last="mined_negatives: 5"),
            "data source 'beir' mines 5 negatives a query and uses none. To fix, set negatives",
        ),
        (
            f"{sources('sts', 'contrastive')} && loss.score_distillation=1",
            "loss.score_distillation compares the passages of a row, and data source "
            "'contrastive' has 1 without negatives. To fix, set negatives above 0.",
        ),
        (
            sources("sts", "beir", last="perturbed_negatives: 5"),
            "data source 'beir' makes 5 negatives a query and uses none. To fix, set negatives",
        ),
        (
            sources("sts", last="perturbed_negatives: 5"),
            "negatives of data source 'sts' need queries with passages, not kind sts. To fix",
        ),
        (
            f"{sources('sts', 'contrastive')} && loss.distillation_scores=1",
            "loss.distillation_scores compares the passages of a query, and each has one: no data "
            "source has negatives. To fix, set negatives of a source above 0, and mined",
        ),
        (
            f"{sources('sts')} && loss.distillation_scores=1",
            "loss.distillation_scores needs data.train of kind contrastive or beir or mteb or par",
        ),
        (
            f"{sources('beir', 'sts', last='')} && {ZERO} && loss.distillation_scores=1"
            " && loss.teacher_scores_in_batch=true",
            "no loss applies to data source 'sts' of kind sts. To fix, set a weight under loss",
        ),
        (ZERO, "all weights under loss are 0. To fix, set e.g. loss.sts_regression=1."),
        (
            sources("sentences"),
            "loss.sts_regression needs data.train of kind sts. To fix, set it to 0 or add such",
        ),
        (PIECES, "compares the texts of a batch. To fix, leave it out"),
        (
            sources("sentences", part="eval"),
            "data.eval 'sentences' is of kind sentences; sts, beir, mteb, parallel can be ",
        ),
        (
            sources("contrastive", part="eval"),
            "data.eval 'contrastive' is of kind contrastive; sts, beir, mteb, parallel can be",
        ),
        ("evaluation.modes=[]", "evaluation.modes is empty. To fix, write e.g. [dense]."),
        (
            "evaluation.modes=[dense, late]",
            "evaluation.modes[1] 'late' is not one of ('dense', 'sparse', 'colbert', "
            "'dense+sparse', 'all'). To fix, choose one.",
        ),
        (
            "evaluation.keep_best=eval/dev/cosine_spearman",
            "evaluation.keep_best 'eval/dev/cosine_spearman' is not evaluated. To fix, choose one "
            "of dev/cosine_spearman.",
        ),
        (
            "data.eval=[{name: dev, kind: sts, path: a}, {name: x, kind: beir, path: b}]"
            " && evaluation.keep_best=x/ndcg_at_5",
            f"evaluation.keep_best 'x/ndcg_at_5' is not evaluated. To fix, choose one of "
            f"{EVALUATED}.",
        ),
        (
            f"{COLLECTION} && evaluation.modes=[sparse] && evaluation.keep_best=x/ndcg_at_10",
            "To fix, choose one of x/sparse_ndcg_at_10, x/sparse_mrr_at_10",
        ),
        (
            "data.eval=[] && evaluation.keep_best=dev/cosine_spearman",
            "is not evaluated. To fix, choose one of the scores of data.eval, which is empty.",
        ),
        (
            "evaluation.keep_best=dev/cosine_spearman && model.l0_module.eval_target_model=false",
            "evaluation.keep_best would keep the model before anything is pruned: with "
            "model.l0_module.eval_target_model=false it is evaluated as large as it still is. To "
            "fix, set eval_target_model=true, or keep_best=null.",
        ),
    ],
)
def test_refused_objectives(overrides, message, check):
    with pytest.raises(ConfigError) as error:
        check(overrides)
    assert message in str(error.value)
    if named := re.search(r"configs/\S+\.yaml", str(error.value)):
        assert (ROOT / named.group()).is_file()


def test_a_processed_folder_that_is_a_file_is_refused(check, tmp_path):
    (tmp_path / "p").touch()
    with pytest.raises(ConfigError, match=r"processed_folder .*/p is a file\. To fix, name a fold"):
        check(f"data.processed_folder={tmp_path}/p")


TWO = "data.eval=[{name: x, kind: beir, path: a}, {name: y, kind: sts, path: a}]"
BEST = f"{TWO} && evaluation.modes=[dense, dense+sparse] && evaluation.keep_best="


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        NO_TEACHER,
        f"{sources('sentences', 'mteb')} && loss.sts_regression=0",
        f"{sources('sts', 'contrastive', 'beir')} && loss.sts_regression=0",
        "device_train_microbatch_size=8",
        "device_train_microbatch_size=64",
        "device_train_microbatch_size=1 && loss.distillation_similarity=0",
        f"{PIECES} && loss.distillation_similarity=0",
        *(f"{BEST}{key}" for key in ("y/cosine_spearman", "x/recall_at_100")),
        f"{BEST}x/dense+sparse_map_at_100",
        "model.l0_module=null && evaluation.keep_best=dev/cosine_spearman",
    ],
)
def test_accepted_objectives(overrides, check):
    check(overrides)


def test_a_run_does_not_resume_from_the_other_kind_of_checkpoint(tiny_yaml, tmp_path):
    config = load_config([tiny_yaml])
    check_checkpoint_kind(config, None)
    check_checkpoint_kind(config, tmp_path / "ba2-rank0.pt")
    with pytest.raises(ConfigError, match=r"is a sharded checkpoint.*=sharded and parallelism\.f"):
        check_checkpoint_kind(config, tmp_path)
