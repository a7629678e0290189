"""The whole life of a run in one command: prune, extract, recover, evaluate, report.

Launch:
    python scripts/run_pipeline.py CONFIG.yaml [more.yaml ...] [key=value ...]
    composer -n 2 scripts/run_pipeline.py CONFIG.yaml ...
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bge_pruning.config import Config, ConfigError, load_config, pruned_model_folder

log = logging.getLogger(__name__)


def run_pipeline(
    paths: Sequence[str], overrides: Sequence[str], sts_files: Sequence[str]
) -> dict[str, Any]:
    """Prune, extract, recover, evaluate and report.

    Every step is also a command of its own; they are written to ``commands.txt`` in the results
    folder. On several ranks, training is shared and the first rank does the rest.

    Args:
        paths: YAML files.
        overrides: ``key=value`` strings.
        sts_files: Scored sentence pairs to evaluate on; not used for anything else.

    Returns:
        The evaluation, as in ``evaluation.json``, on rank 0; an empty dict on the others.

    Raises:
        ConfigError: If the configuration does not prune, or the results folder holds another
            run's results.
    """
    from composer.utils import dist, get_device

    from bge_pruning.models.extraction import extract, write_gates
    from bge_pruning.train import train

    started = time.monotonic()
    config = load_config(paths, [*overrides, "stage=prune"])
    recovery = load_config(paths, [*overrides, "stage=recover"])
    results = Path(config.results_folder)
    _check(config, sts_files)
    dist.initialize_dist(get_device(config.device))
    _on_rank_zero(lambda: _prepare_results(config))

    run = train(config)
    pruned = pruned_model_folder(config)
    _on_rank_zero(lambda: extract(run, pruned))
    _on_rank_zero(lambda: write_gates(run, results / "gates.npz"))
    recovered = train(recovery)
    _on_rank_zero(lambda: extract(recovered, results / "model"))
    evaluation: dict[str, Any] = {}

    def finish() -> None:
        for folder, name in ((run, "metrics.jsonl"), (recovered, "metrics-recovery.jsonl")):
            shutil.copyfile(folder / "metrics.jsonl", results / name)
        shutil.copyfile(results / "model" / "pruning.json", results / "pruning.json")
        evaluation.update(_evaluate(config, sts_files))
        _report(config, paths, overrides, sts_files, evaluation)
        log.info("%s complete after %.1f minutes", results, (time.monotonic() - started) / 60)

    _on_rank_zero(finish)
    return evaluation


def _on_rank_zero(action: Callable[[], object]) -> None:
    """Do something once; the other ranks wait."""
    from composer.utils import dist

    if dist.get_global_rank() == 0:
        action()
    dist.barrier()


def _check(config: Config, sts_files: Sequence[str]) -> None:
    from bge_pruning.datasets.sts_dataloader import read_sts

    if config.model.l0_module is None:
        raise ConfigError(
            "model.l0_module is null: there is nothing to prune. To fix, add a target, e.g. "
            "configs/bge_m3/target_60pct.yaml."
        )
    if config.autoresume:
        raise ConfigError(
            "the pipeline cannot go on with a run that was interrupted. To fix, run its steps one "
            "by one with autoresume=true (commands.txt in the results folder lists them)."
        )
    for file in sts_files:
        read_sts(file)


def _prepare_results(config: Config) -> None:
    """An empty results folder; an earlier one is replaced only if asked and if it is one."""
    results = Path(config.results_folder)
    if results.exists() and any(results.iterdir()):
        ours = (results / "config.yaml").is_file()
        if not (config.overwrite and ours):
            raise FileExistsError(
                f"{results} holds results and is kept. To fix, set another run_name, or "
                f"overwrite=true (only if it holds results of a run)."
            )
        shutil.rmtree(results)
    results.mkdir(parents=True, exist_ok=True)
    from bge_pruning.config import to_yaml

    (results / "config.yaml").write_text(to_yaml(config), encoding="utf-8")


def _evaluate(config: Config, sts_files: Sequence[str]) -> dict[str, Any]:
    from bge_pruning.datasets.sts_dataloader import read_sts
    from bge_pruning.models.hub import fetch_model_folder
    from bge_pruning.utils.evaluation import evaluate

    sts = {}
    for file in sts_files:
        pairs = read_sts(file)
        sts[Path(file).stem] = (pairs.sentences1, pairs.sentences2, pairs.scores)
    base = fetch_model_folder(config.model.base_model, config.model.revision)
    results = Path(config.results_folder)
    evaluation = evaluate(
        str(results / "model"),
        str(base),
        sts,
        also={"pruned, before recovery": str(pruned_model_folder(config))},
    )
    text = json.dumps(evaluation, indent=2) + "\n"
    (results / "evaluation.json").write_text(text, encoding="utf-8")
    return evaluation


def _report(
    config: Config,
    paths: Sequence[str],
    overrides: Sequence[str],
    sts_files: Sequence[str],
    evaluation: dict[str, Any],
) -> None:
    from bge_pruning.utils.report import write_report

    results = Path(config.results_folder)
    commands = step_commands(config, paths, overrides, sts_files)
    (results / "commands.txt").write_text("\n".join(commands) + "\n", encoding="utf-8")
    write_report(results)


def step_commands(
    config: Config, paths: Sequence[str], overrides: Sequence[str], sts_files: Sequence[str]
) -> list[str]:
    """The pipeline's steps as commands, in order."""
    arguments = shlex.join([*paths, *overrides])
    results, run = config.results_folder, config.run_folder
    sts = shlex.join(sts_files)
    return [
        f"python scripts/train_pruning.py {arguments}",
        f"python scripts/extract_pruned_model.py {run} {results}/pruned_model",
        f"python scripts/train_pruning.py {arguments} stage=recover",
        f"python scripts/extract_pruned_model.py {run}-recovery {results}/model",
        f"python scripts/evaluate_model.py {results}/model --baseline {config.model.base_model} "
        f"--sts {sts} --output {results}/evaluation.json",
        f"python scripts/write_report.py {results}",
    ]
