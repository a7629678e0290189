"""What length grouping is worth: padding and rows per second of each source, with and without."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from composer.utils import get_device
from torch.utils.data import DataLoader

from bge_pruning.builders import build_base_model, build_metadata, build_model, build_teacher
from bge_pruning.config import Config
from bge_pruning.data_builders import build_probes, build_train_loader, check_objective
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.plan import build_plan


@dataclass(frozen=True)
class SourceSpeed:
    """Measurements of one source, each with grouping and without: ``(grouped, random)``.

    Attributes:
        name: Name of the source.
        padding: Share of the tokens that is padding.
        loading: Rows per second that are made into batches.
        training: Rows per second of forward, loss and backward pass.
    """

    name: str
    padding: tuple[float, float]
    loading: tuple[float, float]
    training: tuple[float, float]


def measure_grouping(config: Config, batches: int) -> list[SourceSpeed]:
    """Measure every source of a configuration.

    Batches with and without grouping alternate, so that both meet the same load of the machine.

    Args:
        config: The run whose batches, model and losses are used; nothing is kept of it.
        batches: Batches to measure of each source.

    Raises:
        ConfigError: If the configuration cannot be trained on.
        ValueError: If the data is wrong.
    """
    check_objective(config)
    base = build_base_model(config)
    teacher = build_teacher(config, base)
    metadata = build_metadata(config, build_plan(config), base)
    loaders = []
    for grouped in (True, False):
        config.data.group_by_length = grouped
        loaders.append(build_train_loader(config, base, teacher).dataloader)
    model = build_model(config, base, metadata, teacher)
    model = get_device(config.device).module_to_device(model).train()
    return [
        _measure_source(model, loaders, source, batches, config.device)
        for source in range(len(loaders[0].dataset.names))
    ]


def _measure_source(
    model: ComposerBGEM3, loaders: list[DataLoader], source: int, batches: int, device: str | None
) -> SourceSpeed:
    loading, probes = [], []
    for loader in loaders:
        started = time.perf_counter()
        probes.append(build_probes(loader, batches, source))
        rows = sum(len(batch["input_ids"]) for batch in probes[-1])
        loading.append(rows / (time.perf_counter() - started))
    seconds, rows = [0.0, 0.0], [0, 0]
    move = get_device(device).batch_to_device
    _step(model, move(probes[0][0]))  # the first step also allocates
    for pair in zip(*probes, strict=True):
        for index, batch in enumerate(pair):
            seconds[index] += _step(model, move(batch))
            rows[index] += len(batch["input_ids"])
    masks = [[batch["attention_mask"] for batch in part] for part in probes]
    padding = [1 - sum(int(m.sum()) for m in part) / sum(m.numel() for m in part) for part in masks]
    training = [count / spent for count, spent in zip(rows, seconds, strict=True)]
    name = loaders[0].dataset.names[source]
    return SourceSpeed(name, tuple(padding), tuple(loading), tuple(training))


def _step(model: ComposerBGEM3, batch: dict) -> float:
    """Seconds of a step without the optimizer."""
    started = time.perf_counter()
    model.loss(model(batch), batch)["total"].backward()
    model.zero_grad(set_to_none=True)
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def render_speeds(speeds: list[SourceSpeed]) -> str:
    """The measurements as a table."""
    lines = [
        f"{'':<22} {'padding':>17} {'loading, rows/s':>19} {'training, rows/s':>19} {'':>7}",
        f"{'source':<22} {'grouped':>9} {'random':>7} {'grouped':>11} {'random':>7} "
        f"{'grouped':>11} {'random':>7} {'ratio':>7}",
    ]
    lines += [
        f"{s.name:<22} {s.padding[0]:>9.1%} {s.padding[1]:>7.1%} {s.loading[0]:>11,.0f} "
        f"{s.loading[1]:>7,.0f} {s.training[0]:>11,.1f} {s.training[1]:>7,.1f} "
        f"{s.training[0] / s.training[1]:>7.2f}"
        for s in speeds
    ]
    return "\n".join(lines)
