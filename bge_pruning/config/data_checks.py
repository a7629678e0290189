"""Checks of passages of articles and of the mixtures of a run."""

from __future__ import annotations

from difflib import get_close_matches

from bge_pruning.config.checks import share_of_run
from bge_pruning.config.schema import Config, ConfigError, SourceConfig


def check_passages(config: Config) -> None:
    """Refuse passages that no text can have, or that the model would cut again."""
    for source in [*config.data.train, *config.data.eval]:
        _check_source(source, f"of data source '{source.name}'", config.model.max_length)


def _check_source(source: SourceConfig, where: str, max_length: int) -> None:
    passages = source.passages
    if passages is None:
        return
    if source.kind != "sentences":
        raise ConfigError(
            f"passages {where} is not for kind {source.kind}. To fix, remove it, or set kind to "
            f"sentences."
        )
    limits = {"max_tokens": passages.max_tokens}
    if passages.long_share:
        limits["long_max_tokens"] = passages.long_max_tokens
    for name, limit in limits.items():
        if not passages.min_tokens <= limit <= max_length:
            raise ConfigError(
                f"passages.{name} {limit} {where} is not from min_tokens {passages.min_tokens} to "
                f"model.max_length {max_length}. To fix, write a number in between, or change the "
                f"other two."
            )


def mixture_ends(config: Config, epoch: int | None = None) -> list[int] | None:
    """The step with which each of ``data.stages`` ends.

    Args:
        epoch: Batches of an epoch; a run that counts in epochs is not known without: ``None``.

    Raises:
        ConfigError: If one ends before it begins, or the last one not with the run.
    """
    count, unit = int(config.max_duration[:-2]), config.max_duration[-2:]
    if unit == "ep" and epoch is None:
        return None
    run = count * (epoch if unit == "ep" else 1)
    ends = [0]
    for number, part in enumerate(config.data.stages):
        if (part.steps is None) == (part.until is None):
            raise ConfigError(
                f"data.stages[{number}] needs steps or until, and not both. To fix, write e.g. "
                f"steps: 500, or until: 0.5dur."
            )
        share = None if part.until is None else share_of_run(part.until, f"{run}ba")
        ends.append(ends[-1] + part.steps if share is None else round(share * run))
        if ends[-1] <= ends[-2]:
            raise ConfigError(
                f"data.stages[{number}] until {part.until} ends with step {ends[-1]}, before it "
                f"begins. To fix, write a later end than {ends[-2]}ba."
            )
    if ends[-1] != run and len(ends) > 1:
        stage = "recovery." if config.stage == "recover" else ""
        raise ConfigError(
            f"data.stages end with step {ends[-1]}, the run with {run} ({stage}max_duration "
            f"{config.max_duration}). To fix, write until: 1dur for the last one, and shares such "
            f"as 0.5dur for the others{', or give recovery.data.stages' if stage else ''}."
        )
    return ends[1:]


def check_mixtures(config: Config) -> None:
    """Refuse mixtures of sources that are not there, of none, and sources that are in none."""
    known, drawn = [source.name for source in config.data.train], set()
    for number, part in enumerate(config.data.stages):
        where = f"data.stages[{number}].weights"
        if unknown := [name for name in part.weights if name not in known]:
            close = get_close_matches(unknown[0], known, n=1)
            fix = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(known)}."
            raise ConfigError(f"{where} names '{unknown[0]}', no source of data.train: {fix}")
        shares = part.weights or dict.fromkeys(known, 1.0)
        if min(shares.values()) < 0 or not any(shares.values()):
            raise ConfigError(
                f"{where} {shares} are below 0, or all 0. To fix, give the sources to draw from "
                f"weights above 0."
            )
        drawn |= {name for name, share in shares.items() if share}
    if config.data.stages and (left := [name for name in known if name not in drawn]):
        raise ConfigError(
            f"data source '{left[0]}' has a weight in none of data.stages. To fix, give it one, or "
            f"remove it."
        )
    if config.data.stages and config.data.adapt_weights_interval is not None:
        raise ConfigError(
            "data.adapt_weights_interval changes weights that data.stages says. To fix, leave one "
            "of the two out."
        )
