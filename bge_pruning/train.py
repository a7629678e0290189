"""Train a model with gates (prune), or the extracted model without them (recover).

Launch:
    composer -n 1 -m bge_pruning.train CONFIG.yaml [more.yaml ...] [key=value ...]
    python -m bge_pruning.train CONFIG.yaml [more.yaml ...] [key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bge_pruning.config.shipped import CONFIG_HELP, KEYS, split_arguments
from bge_pruning.utils.guard import CommandLine, run_command, say

PROGRAM = "bge-pruning"  # as a subcommand of it, not as a script

if TYPE_CHECKING:
    from bge_pruning.config.schema import Config


def main(argv: Sequence[str] | None = None, prog: str = "python -m bge_pruning.train") -> int:
    """Run the command line of a training; return the exit code."""
    description = (
        "Prune a model with learned gates, or train an extracted model on.\n\n"
        "dry_run=true prints the plan and stops; stage=recover trains the extracted model. Every "
        "key is listed in\nbge_pruning/config/schema.py."
    )
    parser = CommandLine(prog, description, "bge_m3/target_60pct dry_run=true", KEYS)
    parser.add_argument("config", nargs="+", help=CONFIG_HELP)
    paths, overrides = split_arguments(parser.read(argv).config)
    installed = prog.startswith(f"{PROGRAM} ")
    extract = f"{PROGRAM} extract" if installed else "python scripts/extract_pruned_model.py"

    def command() -> None:
        from bge_pruning.config.load import load_config

        config = load_config(paths, overrides)
        show_plan(config) if config.dry_run else train(config, extract)

    return run_command(command, slow=True)


def show_plan(config: Config) -> None:
    """Print what a training stage will do, and refuse what would stop it."""
    from bge_pruning.training.plan import build_plan
    from bge_pruning.training.plan_text import render_plan
    from bge_pruning.training.run_start import check_planned, find_base_folder

    plan = build_plan(config, find_base_folder(config))
    say(render_plan(plan, config))
    check_planned(config, plan)


def train(config: Config, extract: str | None = None) -> Path:
    """Run a training stage.

    Args:
        extract: How the extraction is called, if the log is to end with it as the next step.

    Returns:
        The run folder, with checkpoints, ``config.yaml``, ``run.json``, ``metrics.jsonl``,
        ``train.log`` and the report.

    Raises:
        ConfigError: If the configuration does not fit the model or the data.
        OSError: If the run folder is in use, or the model cannot be loaded.
        StoppedError: If the run was told to stop; it can be resumed.
        ValueError: If the run is to be resumed, and all its checkpoints are damaged.
    """
    from composer.utils import dist

    from bge_pruning.training.stage import all_ranks, run_stage
    from bge_pruning.utils.run_log import RunLog

    with RunLog(dist.get_global_rank()) as run_log, all_ranks(config) as watch:
        run_stage(config, watch, run_log, extract)
    return Path(config.run_folder)


if __name__ == "__main__":
    sys.exit(main())
