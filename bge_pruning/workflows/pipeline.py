"""The whole life of a run in one command: prune, extract, recover, evaluate, report.

Launch it on several GPUs with ``composer -n 2 scripts/run_pipeline.py CONFIG.yaml ...``.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import command_words
from bge_pruning.config.command_checks import check_pipeline
from bge_pruning.config.load import Config, load_config, to_yaml
from bge_pruning.config.names import L0
from bge_pruning.reports.report import write_report
from bge_pruning.training.rank_watch import on_rank_zero, rank_zero_first
from bge_pruning.training.run_report import collect_run, extraction_arguments, log_results
from bge_pruning.training.run_start import check_run_folder, remove_run
from bge_pruning.training.stage import all_ranks
from bge_pruning.utils.files import refuse_unwritable_folders, write_text
from bge_pruning.utils.guard import warn_only
from bge_pruning.utils.records import EvaluationRecord
from bge_pruning.workflows import stages
from bge_pruning.workflows.stages import EvaluationPlan, evaluate_model

log = logging.getLogger(__name__)


def run_pipeline(
    paths: Sequence[str], overrides: Sequence[str], judged_by: EvaluationPlan
) -> EvaluationRecord | None:
    """Prune, extract, recover, evaluate on tasks that are used for nothing else, and report.

    Every step is also a command of its own; they are written to ``commands.txt`` in the results
    folder. On several ranks, training is shared and the first rank does the rest. With
    ``autoresume`` the trainings of an earlier call, finished or not, are resumed, and what follows
    from them is written again.

    Returns:
        The evaluation, as in ``evaluation.json``, on rank 0; ``None`` on the others.

    Raises:
        ConfigError: If the configuration does not prune, or the results folder holds another
            run's results.
        StoppedError: If a signal ends it.
    """
    started = time.monotonic()
    config = load_config(paths, [*overrides, "stage=prune"])
    recovery = load_config(paths, [*overrides, "stage=recover"])
    results = Path(config.results_folder)
    evaluations: list[EvaluationRecord] = []

    def finish() -> None:
        evaluations.append(evaluate_model(config, tasks, judged_by))
        commands = step_commands(config, recovery, paths, overrides, judged_by)
        _report(config, commands, evaluations[0])
        log.info("%s complete after %.1f minutes", results, (time.monotonic() - started) / 60)

    with all_ranks(config):
        with rank_zero_first():  # which fetches them
            tasks = judged_by.tasks()
        check_pipeline(config, recovery)
        _check_results(config)
        check_run_folder(recovery)
        stages.check_road(config, recovery, judged_by.modes)
        stages.check_tasks(config, recovery, tasks, judged_by.max_length)
        options = stages.export_options(config)
        # All ranks have looked before the first one changes anything.
        on_rank_zero(lambda: stages.check_vocabulary(config, options))
        on_rank_zero(lambda: _prepare_results(config, Path(recovery.run_folder)))
        stages.prune(config)
        stages.recover(recovery, results / "model", options, config.autoresume)
        on_rank_zero(finish)
    return evaluations[0] if evaluations else None


def _check_results(config: Config) -> None:
    """Refuse a results folder in use, unless its run is resumed, or to be replaced and one."""
    results = Path(config.results_folder)
    refuse_unwritable_folders({"results_folder": results})
    in_use = results.exists() and any(results.iterdir())
    may = config.overwrite or config.autoresume
    if in_use and not (may and (results / "config.yaml").is_file()):
        raise FileExistsError(
            f"{results} holds results and is kept. To fix, set another run_name, or (only if it "
            f"holds results of a run) autoresume=true to go on with it or overwrite=true."
        )


def _prepare_results(config: Config, recovery: Path) -> None:
    """Make a results folder with the configuration; it is empty unless the run is resumed.

    What is left of an earlier recovery is removed now, so that it is not what is resumed later.
    """
    results = Path(config.results_folder)
    if not config.autoresume:
        remove_run(results)
        remove_run(recovery)
    results.mkdir(parents=True, exist_ok=True)
    (results / "config.yaml").write_text(to_yaml(config), encoding="utf-8")


def _report(config: Config, commands: list[str], evaluation: EvaluationRecord) -> None:
    results = Path(config.results_folder)
    write_text(results / "commands.txt", "\n".join(commands) + "\n")
    collect_run(results, Path(config.run_folder))
    write_report(results, overwrite=config.autoresume)
    with warn_only("sending the results to W&B", f"look at {results / 'report.html'}"):
        log_results(config, evaluation)


def step_commands(
    config: Config,
    recovery: Config,
    paths: Sequence[str],
    overrides: Sequence[str],
    judged_by: EvaluationPlan,
) -> list[str]:
    """The pipeline's steps as commands, in order."""
    results, run = config.results_folder, config.run_folder
    # A run that replaces an earlier one can be replayed over itself.
    again = ["--overwrite"] if config.overwrite else []

    def line(script: str, *words: str) -> str:
        return shlex.join([*command_words(script), *words])

    pruning = [
        line("train_pruning", *paths, *overrides),
        line("extract_pruned_model", *extraction_arguments(config)),
    ]
    if config.method != L0:
        pruning = [line("run_pipeline", *paths, *overrides, "--only", "cut", *again)]
    model, result = f"{results}/model", f"{results}/evaluation.json"
    also = [f"--also={name}={folder}" for name, folder in judged_by.also(config).items()]
    evaluation = ["--baseline", config.model.base_model, *also]
    evaluation += [*judged_by.arguments(), "--output", result]
    return [
        *pruning,
        line("train_pruning", *paths, *overrides, "stage=recover"),
        line("extract_pruned_model", *extraction_arguments(recovery)),
        line("evaluate_model", model, *evaluation, *again),
        line("evaluate_model", model, "--card", "--evaluation", result),
        line("write_report", results, "--run", run, *again),
    ]
