"""Several sizes from one pruning run: each is cut from the next larger one, and trained on.

Launch it on several GPUs with ``composer -n 2 scripts/export_family.py CONFIG.yaml ...``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bge_pruning.config.command_checks import check_family
from bge_pruning.config.load import Config, load_config, pruned_model_folder, to_yaml
from bge_pruning.evaluation.tasks import Task
from bge_pruning.export.extract import ExtractOptions, write_model
from bge_pruning.export.extraction import Extraction, nested_extraction, start_extraction
from bge_pruning.export.model_card import write_model_card
from bge_pruning.export.pruning_record import MARKER, compute_constraint_report, warn_if_far
from bge_pruning.model_io.checkpoint import find_checkpoint, load_trained_model
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.structural_pruning import KeepIndices
from bge_pruning.reports.comparison import EVALUATION
from bge_pruning.reports.comparison_report import write_comparison
from bge_pruning.reports.report import MARKDOWN, write_report
from bge_pruning.selection.nested_shapes import check_densities, choose_nested_shapes
from bge_pruning.training.plan import fetch_plan
from bge_pruning.training.rank_watch import ask_rank_zero, on_rank_zero, rank_zero_first
from bge_pruning.training.stage import all_ranks
from bge_pruning.utils.files import refuse_unwritable_folders, write_text
from bge_pruning.utils.json_records import read_record
from bge_pruning.utils.records import Constraint, Kept, PruningRecord
from bge_pruning.workflows import stages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One size of a family.

    Attributes:
        name: Such as ``75pct``.
        density: Share of the encoder's parameters that was asked for.
        constraint: How near the gates were to what is kept.
    """

    name: str
    density: float
    shape: EncoderShape
    keep: KeepIndices
    constraint: dict[str, Constraint]


def export_family(
    paths: Sequence[str],
    overrides: Sequence[str],
    densities: Sequence[float],
    judged_by: stages.EvaluationPlan,
    run: Path | None = None,
) -> list[Path]:
    """Prune once, then cut, recover and evaluate every size, from the largest to the smallest.

    A size that is there already, from an earlier call that was interrupted, is kept as it is,
    unless the configuration says ``overwrite``. With ``autoresume``, which takes precedence, the
    trainings of that call, finished or not, are resumed too.

    Args:
        densities: Shares of the encoder's parameters to keep.
        run: A finished pruning run (folder or checkpoint); ``None`` to train it first.

    Returns:
        The results folder of each size, the largest first; their comparison lies beside them.

    Raises:
        ConfigError: If the configuration does not prune.
        FileExistsError: If a size of other gates is there already.
        FileNotFoundError: If the run does not exist.
        StoppedError: If a signal ends it.
        ValueError: If the densities are no different numbers in (0, 1), or no nested shapes have
            them.
    """
    from bge_pruning.train import train

    check_densities(densities)
    config = load_config(paths, [*overrides, "stage=prune"])
    if config.autoresume:
        overrides = [*overrides, "overwrite=false"]
        config = load_config(paths, [*overrides, "stage=prune"])
    recovery = load_config(paths, [*overrides, "stage=recover"])
    family = family_folder(config)

    def own_config(member: Member, stage: str) -> Config:
        names = [f"run_name={config.run_name}-{member.name}", f"stage={stage}"]
        names += [f"run_folder={config.run_folder}-{member.name}"]
        names += [f"results_folder={family / member.name}"]
        return load_config(paths, [*overrides, *names])

    def choose() -> list[Member]:
        members = choose_members(pruned, densities, stages.keeps_best(config) and run is None)
        _check_members(members, family, config.overwrite)
        return members

    def finish() -> None:
        for member in members:
            _judge(own_config(member, "prune"), tasks, judged_by)
        _compare(family, members)

    with all_ranks(config):
        with rank_zero_first():  # which fetches models and tasks
            _check(config, recovery, densities, judged_by.modes)
            options = stages.export_options(config)
            tasks = judged_by.tasks()
        on_rank_zero(lambda: stages.check_vocabulary(config, options))
        stages.check_tasks(config, recovery, tasks, judged_by.max_length)
        pruned = train(config) if run is None else run
        members = ask_rank_zero(choose)
        larger: Path | None = None
        for member in members:
            larger = _make(member, pruned, larger, config, own_config(member, "recover"), options)
        on_rank_zero(finish)
    return [family / member.name for member in members]


def family_folder(config: Config) -> Path:
    """Where the sizes lie."""
    return Path(f"{config.results_folder}-family")


def choose_members(run: Path, densities: Sequence[float], best: bool = False) -> list[Member]:
    """The sizes of the gates of a run, or of its best checkpoint, from the largest to the smallest.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the run has no gates, or no nested shapes have these densities.
    """
    model = load_trained_model(find_checkpoint(run, best))
    gates = model.l0_module
    if gates is None:
        raise ValueError(f"{run}: is a run without gates. To fix, name a pruning run.")
    warn_if_far(compute_constraint_report(gates, gates.realised_shape()))
    shapes = choose_nested_shapes(gates, densities)
    return [
        Member(
            f"{100 * density:g}pct",
            density,
            shape,
            model.backbone.keep_indices(gates.masks_of(shape)),
            compute_constraint_report(gates, shape),
        )
        for density, shape in zip(sorted(densities, reverse=True), shapes, strict=True)
    ]


def _check(
    config: Config, recovery: Config, densities: Sequence[float], modes: Sequence[str]
) -> None:
    """Refuse now what would be refused hours later."""
    check_family(config, recovery)
    refuse_unwritable_folders({"the family's folder": family_folder(config)})
    plan = fetch_plan(config)
    stages.check_recovery(recovery, plan, modes)
    targets = (plan.target, plan.target_parameters, plan.target_speedup, plan.target_length)
    # Untrained gates tell as well whether there are nested shapes.
    gates = L0Module(plan.source, plan.axes, *targets, seed=config.seed)
    choose_nested_shapes(gates, densities)


def _check_members(members: Sequence[Member], family: Path, overwrite: bool) -> None:
    """Refuse a size of other gates before hours are spent on the ones before it."""
    for member in members:
        folder = family / member.name / "model"
        if folder.exists() and not overwrite and not is_done(folder, member):
            raise FileExistsError(
                f"{folder} is of other gates or another density and is kept. To fix, set another "
                f"run_name, or overwrite=true."
            )


def is_done(folder: Path, member: Member) -> bool:
    """Whether a folder, ``model`` in the results folder of a size, holds its recovered model."""
    record = folder / MARKER
    if not record.is_file():
        return False
    info = read_record(record, PruningRecord, "remove the folder of this size; it is made again")
    return info.kept == Kept(**member.keep.as_dict()) and "recover" in info.batches


def _make(
    member: Member,
    run: Path,
    larger: Path | None,
    config: Config,
    recovery: Config,
    options: ExtractOptions,
) -> Path:
    """Cut one size, train it on and extract it; returns the folder of its recovery run."""
    model = Path(recovery.results_folder) / "model"
    if not config.overwrite and ask_rank_zero(lambda: is_done(model, member)):
        log.info("%s is there already and is kept", model)
        return Path(recovery.run_folder)
    log.info("%s: %s", member.name, member.shape.describe())

    def cut() -> None:
        source = run if larger is None else larger
        best = stages.keeps_best(config if larger is None else recovery) and source.is_dir()
        checkpoint, pruned = find_checkpoint(source, best), pruned_model_folder(recovery)
        cut_member(member, checkpoint, pruned, nested=larger is not None)

    on_rank_zero(cut)
    return stages.recover(recovery, model, options, config.overwrite)


def cut_member(member: Member, checkpoint: Path, output: Path, nested: bool) -> None:
    """Write one size, not recovered yet, and replace an extracted model in ``output``.

    The checkpoint is that of the pruning run or, if ``nested``, of the recovery of the next larger
    size.
    """

    def start() -> Extraction:
        if not nested:
            return start_extraction(checkpoint, member.shape)
        larger = start_extraction(checkpoint)
        return nested_extraction(larger, member.keep, member.shape, member.constraint)

    write_model(start, output, overwrite=True)


def _judge(config: Config, tasks: Sequence[Task], judged_by: stages.EvaluationPlan) -> None:
    """Evaluate one size and report it, as far as an earlier call has not."""
    results = Path(config.results_folder)
    if (results / EVALUATION).is_file() and not config.overwrite:
        log.info("%s is there already and is kept", results / EVALUATION)
        if (results / MARKDOWN).is_file() and (results / "model" / EVALUATION).is_file():
            return
        write_model_card(results / "model", results / EVALUATION)
    else:
        stages.evaluate_model(config, tasks, judged_by)
    metrics = Path(f"{config.run_folder}-recovery") / "metrics.jsonl"
    copies = {"metrics-recovery.jsonl": metrics, MARKER: results / "model" / MARKER}
    for name, source in copies.items():
        write_text(results / name, source.read_text(encoding="utf-8"))
    write_text(results / "config.yaml", to_yaml(config))
    write_report(results, overwrite=True)


def _compare(family: Path, members: Sequence[Member]) -> None:
    """Put all sizes in one table and one picture."""
    names = [f"{member.name}={family / member.name}" for member in members]
    write_comparison(names, family, overwrite=True)
    for member in members:
        count = count_parameters(member.shape).encoder
        log.info("%s: %s encoder parameters", family / member.name / "model", f"{count:,}")
