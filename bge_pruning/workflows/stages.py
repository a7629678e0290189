"""The road of one model: prune, cut, recover, extract, evaluate, report.

The pipeline walks it once, a family once for each size, a study once for each cell.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bge_pruning.config.load import Config, ConfigError, pruned_model_folder
from bge_pruning.config.names import HELD_OUT, L0
from bge_pruning.datasets.embedding_dataset import build_tokenizer
from bge_pruning.evaluation import search
from bge_pruning.evaluation.evaluate import evaluate, write_evaluation
from bge_pruning.evaluation.tasks import Task, find_tasks
from bge_pruning.export import extract
from bge_pruning.export.model_card import write_model_card
from bge_pruning.export.vocabulary_texts import choose_for_texts
from bge_pruning.model_io.hub import fetch_model_folder
from bge_pruning.training.builders import build_base_model
from bge_pruning.training.held_out import check_held_out
from bge_pruning.training.plan import Plan, fetch_plan
from bge_pruning.training.rank_watch import on_rank_zero
from bge_pruning.training.run_start import check_inputs, check_outputs, check_run
from bge_pruning.utils.environment import torch_device
from bge_pruning.utils.records import EvaluationRecord
from bge_pruning.workflows.baselines import cut_baseline, plan_baseline
from bge_pruning.workflows.options import given_prompts

# How reports call the extracted model that was not trained on yet.
PRUNED_NAME = "pruned, before recovery"


@dataclass(frozen=True)
class EvaluationPlan:
    """What the finished model is judged by.

    ``sts`` are files of scored pairs or names of tasks, ``retrieval`` folders in BEIR layout or
    names; their split is test, or the only one, unless it is named. ``parallel`` are pairs of
    languages such as ``de-en`` by the path of line-parallel files, of which ``lines`` are searched,
    see :func:`bge_pruning.evaluation.tasks.parallel_task`. For ``prompts``, ``max_length`` and
    ``precision`` see :func:`bge_pruning.evaluation.encoders.load_encoder`. With ``before_recovery``
    the pruned model is scored too, as it was before it was trained on.
    """

    sts: Sequence[str] = ()
    retrieval: Sequence[str] = ()
    split: str | None = None
    modes: Sequence[str] = ("dense",)
    prompts: Mapping[str, str] = field(default_factory=dict)
    parallel: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lines: str = HELD_OUT
    max_length: int | None = None
    precision: str = "fp32"
    before_recovery: bool = True

    @classmethod
    def of(cls, args: Namespace) -> EvaluationPlan:
        """What :data:`bge_pruning.workflows.options.TASKS` were given."""
        parallel: dict[str, list[str]] = {}
        for path, *pairs in args.parallel:
            parallel.setdefault(path, []).extend(pairs)
        given = (args.sts, args.retrieval, args.split, args.modes, given_prompts(args))
        return cls(*given, parallel, args.lines, args.max_length, args.precision)

    def tasks(self) -> list[Task]:
        """The tasks, loaded, see :func:`bge_pruning.evaluation.tasks.find_tasks`."""
        return find_tasks(self.sts, self.retrieval, self.split, self.parallel, self.lines)

    def also(self, config: Config) -> dict[str, str]:
        """Further models to score, by name."""
        return {PRUNED_NAME: str(pruned_model_folder(config))} if self.before_recovery else {}

    def arguments(self) -> list[str]:
        """The same for the command line of ``scripts/evaluate_model.py``."""
        words = ["--sts", *self.sts] if self.sts else []
        if self.retrieval:
            words += ["--retrieval", *self.retrieval]
            words += ["--split", self.split] if self.split else []
        for path, pairs in self.parallel.items():
            words += ["--parallel", path, *pairs]
        words += [f"--lines={self.lines}"] if self.parallel and self.lines != HELD_OUT else []
        for role, prompt in self.prompts.items():
            words += ["--query-prompt" if role == "query" else "--document-prompt", prompt]
        words += [] if self.max_length is None else ["--max-length", str(self.max_length)]
        words += [] if self.precision == "fp32" else ["--precision", self.precision]
        return [*words, "--modes", *self.modes]


def prune(config: Config) -> None:
    """Write the pruned model, not recovered yet, where the recovery looks for it.

    One that is there already is replaced if the configuration says ``autoresume``.
    """
    from bge_pruning.train import train

    pruned, again = pruned_model_folder(config), config.autoresume
    if config.method == L0:
        run = train(config)
        on_rank_zero(lambda: extract.extract(run, pruned, again, keeps_best(config)))
    else:
        on_rank_zero(lambda: cut_baseline(config, pruned, again))


def recover(
    config: Config,
    model: Path,
    options: extract.ExtractOptions | None = None,
    overwrite: bool = False,
) -> Path:
    """Train the pruned model on, write what comes of it to ``model``, and return the run folder."""
    from bge_pruning.train import train

    run = train(config)
    best = keeps_best(config)
    on_rank_zero(lambda: extract.extract(run, model, overwrite, best, options or extract.PLAIN))
    return run


def evaluate_model(
    config: Config, tasks: Sequence[Task], judged_by: EvaluationPlan
) -> EvaluationRecord:
    """Judge the model in the results folder, and write the result there and into its card."""
    base = fetch_model_folder(config.model.base_model, config.model.revision)
    results = Path(config.results_folder)
    model, device = str(results / "model"), torch_device(config.device)
    options = {"also": judged_by.also(config), "device": device}
    options |= {"prompts": judged_by.prompts, "max_length": judged_by.max_length}
    options |= {"precision": judged_by.precision}
    evaluation = evaluate(model, str(base), tasks, judged_by.modes, **options)
    again = config.overwrite or config.autoresume
    write_evaluation(evaluation, results / "evaluation.json", overwrite=again)
    write_model_card(results / "model", results / "evaluation.json")
    return evaluation


def keeps_best(config: Config) -> bool:
    """Whether the best checkpoint of a training is taken, rather than its last."""
    return config.evaluation.keep_best is not None


def check_road(config: Config, recovery: Config, modes: Sequence[str]) -> None:
    """Refuse now what a training or the evaluation would refuse hours later."""
    plan = check_run(config) if config.method == L0 else plan_baseline(config)
    check_recovery(recovery, plan, modes)


def check_recovery(recovery: Config, plan: Plan, modes: Sequence[str]) -> None:
    """Refuse inputs, losses and modes that do not fit a model that is cut by the plan."""
    check_inputs(recovery)
    check_outputs(recovery, plan)
    search.check_modes(modes, plan.outputs, "the finished model")


def check_tasks(
    config: Config, recovery: Config, tasks: Sequence[Task], max_length: int | None
) -> None:
    """Refuse, or warn of, what the finished model is judged by and was trained on.

    Raises:
        ConfigError: See :func:`bge_pruning.training.held_out.check_held_out`.
        ValueError: If ``max_length`` leaves no room for text.
    """
    base = build_base_model(config)
    if max_length is not None:
        build_tokenizer(base.tokenizer_files["tokenizer.json"], max_length)
    for part in [config] if recovery.data == config.data else [config, recovery]:
        # The pruning run looks at its own pairs itself, and at once.
        check_held_out(part, base, {task.name: task for task in tasks}, pairs=part is recovery)


def export_options(config: Config) -> extract.ExtractOptions:
    """What the finished model is written as; what cannot be is refused before the training.

    Raises:
        ConfigError: If the model has no multi-vector head to make square, or fewer tokens than are
            to be kept.
    """
    plan = fetch_plan(config)
    if config.export.colbert_dim == "hidden" and "colbert_vecs" not in plan.outputs:
        raise ConfigError(
            f"export.colbert_dim is hidden, but {config.model.base_model} has no multi-vector head."
            f" To fix, set it to keep, or model.init_missing_heads=true."
        )
    size, limit = config.export.vocabulary_size, plan.source.vocab_size
    if size is not None and size > limit:
        raise ConfigError(
            f"export.vocabulary_size {size} is above the {limit} tokens of "
            f"{config.model.base_model}. To fix, choose fewer, or leave it out."
        )
    return extract.read_options(**asdict(config.export))


def check_vocabulary(config: Config, options: extract.ExtractOptions) -> None:
    """Choose the tokens as they will be chosen at the end: how many must stay depends on texts."""
    if options.vocabulary is not None:
        choose_for_texts(build_base_model(config), options.vocabulary)
