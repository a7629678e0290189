"""Checks of a configuration that hold whatever the model and the command are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from bge_pruning.config import schema
from bge_pruning.config.columns import SPEC
from bge_pruning.config.names import (
    HUB,
    L0,
    LANGUAGE,
    ROLES,
    SOURCE_COLUMNS,
    TARGETS,
    check_hub_data,
)
from bge_pruning.config.schema import Config, ConfigError, SourceConfig

# A larger number is a typing error, and C code would fail above the largest 64-bit integer.
LARGEST = 1e15
MAX_NAME = 200
MAX_WORKERS = 256

BOUNDS = {
    "above 0": lambda v: v > 0,
    "above 1": lambda v: v > 1,
    "0 or more": lambda v: v >= 0,
    "in [0, 1]": lambda v: 0 <= v <= 1,
    "in (0, 1]": lambda v: 0 < v <= 1,
}
UNITS = {"ba": "500ba (batches)", "ep": "2ep (epochs)", "dur": "0.1dur (of the run)"}
SLICE = r"(-?[0-9]{1,9})?:(-?[0-9]{1,9})?"
TIME = r"([0-9]{1,9}|0?\.[0-9]+|[01]\.[0-9]*)(ba|ep|dur)"


def check(config: Config) -> None:
    """Refuse values that break a rule of their key or contradict each other."""
    _check_part(config, "")
    _check_run_name(config.run_name)
    _check_limits(config)
    for source in [*config.data.train, *config.data.eval]:
        _check_source(source)
    for source in config.data.train:
        _check_prompt(source)
    if own := [source.name for source in config.data.eval if source.prompt is not None]:
        raise ConfigError(
            f"prompt of data.eval '{own[0]}' would be for nothing: a model is evaluated with its "
            f"own prompts. To fix, remove it, and write the prompts into the model's "
            f"config_sentence_transformers.json."
        )
    for option, needed in missing_export_options(vars(config.export)).items():
        names = " or ".join(f"export.{name}" for name in needed)
        raise ConfigError(f"export.{option} needs {names}. To fix, set that, or leave it out.")
    _check_parallelism(config)
    if config.model.l0_module is not None:
        _check_target(config.model.l0_module)


def missing_export_options(given: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The options of an export that lack another one, with those that would do."""
    needs = {option.name: option.metadata.get("needs") for option in fields(schema.ExportConfig)}
    given_needs = {option: names for option, names in needs.items() if given[option] and names}
    return {o: names for o, names in given_needs.items() if not any(map(given.get, names))}


def _check_part(part: Any, prefix: str) -> None:
    """Check every key of a dataclass, and of those inside it."""
    for field in fields(part):
        value = getattr(part, field.name)
        path, of, source = prefix.partition(" of ")
        key = f"{path}.{field.name}{of}{source}".removeprefix(".")
        if isinstance(part, SourceConfig):
            key = f"{field.name} of data source '{part.name}'"
        if value is None or field.name == "recovery":  # which is checked where it is merged in
            continue
        parts = value if isinstance(value, list) else [value]
        if any(map(is_dataclass, parts)):
            for item in parts:
                _check_part(item, key)
        else:
            _check_value(value, key)
            _check_rules(value, field.metadata, key)


def _name_item(key: str, index: Any) -> str:
    """An item of a list or an object as a message names it."""
    name, of, source = key.partition(" of ")
    return f"{name}[{index}]{of}{source}"


def _check_value(value: Any, key: str) -> None:
    """Refuse numbers and texts that are valid for no key and would fail far from the file."""
    if isinstance(value, list | dict):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_value(item, _name_item(key, name))
    elif isinstance(value, int | float) and not abs(value) < LARGEST:  # also NaN
        raise ConfigError(
            f"{key} {_shorten(value)} is not a finite number below {LARGEST:.0e}. To fix, write a "
            f"smaller one."
        )
    elif isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{key} {_shorten(value)} holds a null byte. To fix, remove it.")


def _check_rules(value: Any, rules: Mapping[str, Any], key: str) -> None:
    """Check the rules that stand beside a key in the schema."""
    if choices := rules.get("choices"):
        listed = isinstance(value, list)
        for index, item in enumerate(value if listed else [value]):
            if item not in choices:
                name = _name_item(key, index) if listed else key
                raise ConfigError(f"{name} '{item}' is not one of {choices}. To fix, choose one.")
    if units := rules.get("units"):
        _check_time(value, units, key)
    if (bound := rules.get("bound")) and not BOUNDS[bound](value):
        meaning = f": {rules['meaning']}" if "meaning" in rules else ""
        fix = f"write e.g. {rules['example']}" if meaning else f"set {key} {bound}"
        raise ConfigError(f"{key} {value} is not {bound}{meaning}. To fix, {fix}.")


def _check_time(text: str, units: tuple[str, ...], key: str) -> None:
    """Refuse what Composer could not read as a time."""
    found = re.fullmatch(TIME, text)
    whole = found is not None and (found[2] == "dur" or found[1].isdigit())
    if not whole or found[2] not in units:
        raise ConfigError(
            f"{key} '{text}' is not a time, expected a number and a unit such as "
            f"{', '.join(UNITS[unit] for unit in units)}. To fix, write one of these forms."
        )
    if float(found[1]) == 0 and "warmup" not in key:
        raise ConfigError(f"{key} '{text}' is not above 0. To fix, write e.g. 500ba.")


def share_of_run(text: str, run: str, epoch: int | None = None) -> float | None:
    """A time as a share of a run's duration.

    Args:
        epoch: Batches of an epoch; without it, epochs and batches cannot be compared: ``None``.
    """
    (value, unit), (length, of) = (re.fullmatch(TIME, time).groups() for time in (text, run))
    if unit == "dur":
        return float(value)
    if unit == of:
        return float(value) / float(length)
    if epoch is None:
        return None
    return float(value) / float(length) * (epoch if unit == "ep" else 1 / epoch)


def check_schedule(config: Config, epoch: int | None = None) -> None:
    """Refuse times that a run ends before, see :func:`share_of_run`.

    Evaluations, checkpoints and log lines with a longer interval are made at the end.
    """
    l0, trains_gates = config.model.l0_module, config.method == L0
    at_once = {"scheduler.t_warmup": config.scheduler.t_warmup}
    before = {"data.adapt_weights_interval": config.data.adapt_weights_interval}
    if l0 is not None and trains_gates:  # gates decide after their warm-up
        before["model.l0_module.lagrangian_warmup_steps"] = l0.lagrangian_warmup_steps
    stage = "recovery." if config.stage == "recover" else ""
    for key, text in {**at_once, **before}.items():
        share = None if text is None else share_of_run(text, config.max_duration, epoch)
        if share is not None and (share > 1 or (share == 1 and key in before)):
            raise ConfigError(
                f"{key} {text} is not over when the run ends, after {stage}max_duration "
                f"{config.max_duration}. To fix, write a share of the run, e.g. 0.2dur, or train "
                f"for longer."
            )


def _shorten(value: Any) -> str:
    huge = isinstance(value, int) and abs(value) >= LARGEST  # perhaps of thousands of digits
    return "of many digits" if huge else repr(value)[:60]


def _check_run_name(name: str) -> None:
    """Refuse a name that is not a single part of a path: it gets suffixes such as -recovery."""
    inside = Path(name).name == name and name not in (".", "..")
    if not inside or not name.strip() or len(name.encode()) > MAX_NAME:
        raise ConfigError(
            f"run_name '{name[:60]}' is not the name of a folder, of 1 to {MAX_NAME} bytes and "
            f"without '/'. To fix, write a name; run_folder and results_folder say where."
        )


def _check_limits(config: Config) -> None:
    """Refuse what a library would refuse later in words of its own."""
    paths = {"run_folder": config.run_folder, "loggers.folder": config.loggers.folder}
    for key, path in {"run_name": config.run_name, **paths}.items():
        if {"{", "}"} & set(path):  # Composer formats paths, e.g. with {rank}
            raise ConfigError(
                f"{key} '{path[:200]}' holds a brace, which stands for a placeholder. To fix, "
                f"write it without."
            )
    betas = config.optimizer.betas
    if config.seed >= 2**32:
        raise ConfigError(f"seed {config.seed} is not below 2^32. To fix, use e.g. 17.")
    if config.data.num_workers > MAX_WORKERS:
        raise ConfigError(
            f"data.num_workers {config.data.num_workers} is above {MAX_WORKERS} processes. To fix, "
            f"use a few, or 0."
        )
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(
            f"optimizer.betas {betas} are not two numbers in [0, 1). To fix, write e.g. [0.9, "
            f"0.98]."
        )


def _check_parallelism(config: Config) -> None:
    """Refuse what a sharded run cannot do."""
    p = config.parallelism
    if p.state_dict == "sharded" and not p.fsdp:
        raise ConfigError(
            "parallelism.state_dict=sharded needs a sharded model. To fix, set "
            "parallelism.fsdp=true, or state_dict=full."
        )
    if p.state_dict == "sharded" and config.evaluation.keep_best is not None:
        raise ConfigError(
            "evaluation.keep_best writes one file, which parallelism.state_dict=sharded does not. "
            "To fix, set state_dict=full, or keep_best=null."
        )
    for setting, given in (
        ("model.compile=true", config.model.compile),
        ("precision=amp_fp16", config.precision == "amp_fp16"),
    ):
        if p.fsdp and given:
            raise ConfigError(
                f"parallelism.fsdp does not work with {setting}. To fix, leave one of them out."
            )


def check_slice(lines: str, where: str = "") -> str:
    """Return a slice of lines.

    Raises:
        ConfigError: If it is none.
    """
    if not re.fullmatch(SLICE, lines):
        raise ConfigError(
            f"lines '{lines[:60]}'{where} is not FIRST:LAST as Python slices a list. To fix, write "
            f"e.g. ':-400' for all but the last 400, or '-400:' for the last 400."
        )
    return lines


def _check_source(source: SourceConfig) -> None:
    """Refuse values of a source that do not fit its kind or each other."""
    where = f"of data source '{source.name}'"
    _check_lines(source, where)
    _check_table(source, where)
    if len(source.score_range) != 2 or not source.score_range[0] < source.score_range[1]:
        raise ConfigError(
            f"score_range {source.score_range} {where} is not [lowest, highest]. To fix, write "
            f"e.g. [0, 5]."
        )
    if Path(source.split).name != source.split:
        raise ConfigError(
            f"split '{source.split}' {where} is not the name of a split. To fix, write e.g. train."
        )
    if source.replaced_tokens and source.kind != "sentences":
        raise ConfigError(
            f"replaced_tokens {where} is not for kind {source.kind}: its texts would no longer "
            f"mean what their scores or queries say. To fix, name the file again as a source of "
            f"kind sentences."
        )


def _check_table(source: SourceConfig, where: str) -> None:
    """Check how the rows of a file or a Hugging Face dataset are chosen."""
    on_hub = source.path.startswith(HUB)
    if on_hub:
        check_hub_data(source.path.removeprefix(HUB), f"path {where}")
    fits = {
        "rows": source.kind in SOURCE_COLUMNS,
        "data_files": source.kind in SOURCE_COLUMNS,
        "streaming": source.kind in SOURCE_COLUMNS and on_hub,
        "collection": source.kind == "contrastive" and on_hub,
    }
    if wrong := [key for key, does in fits.items() if getattr(source, key) and not does]:
        raise ConfigError(
            f"{', '.join(wrong)} {where} is not for kind {source.kind} with path '{source.path}'. "
            f"To fix, remove it. rows and data_files are for tables, streaming for those of "
            f"{HUB}NAME, and collection for kind contrastive there."
        )
    if source.streaming and "[" in source.split:
        raise ConfigError(
            f"split '{source.split}' {where} cuts a stream. To fix, name the split alone: rows "
            f"says how many are drawn."
        )
    if unknown := set(source.collection) - set(ROLES[:2]):
        raise ConfigError(
            f"collection {where} names {', '.join(sorted(unknown))}. To fix, write the subsets of "
            f"texts as {{query: queries, passage: documents}}."
        )
    if wrong := [
        s for s in source.columns.values() if not SPEC.fullmatch(s) and set("[.*") & set(s)
    ]:
        raise ConfigError(
            f"columns {where} name '{wrong[0]}'. To fix, write the name of a column, or e.g. "
            f"negative_*, passages[].text, ids[1:] or answer.text."
        )


def _check_lines(source: SourceConfig, where: str) -> None:
    """Check the languages and lines of a source whose files have a text a line."""
    if source.lines is not None:
        check_slice(source.lines, f" {where}")
        if source.kind not in ("sentences", "parallel"):
            raise ConfigError(
                f"lines {where} is not for kind {source.kind}. To fix, remove it, or cut the file."
            )
    if source.kind != "parallel":
        if source.languages:
            raise ConfigError(
                f"languages {where} is not for kind {source.kind}. To fix, remove it, or set kind "
                f"to parallel."
            )
        return
    if LANGUAGE not in source.path:
        raise ConfigError(
            f"path '{source.path}' {where} has no {LANGUAGE}. To fix, write it where the name of "
            f"the language stands, e.g. news-{LANGUAGE}.txt."
        )
    names = source.languages
    if {"True", "False"} & set(names):  # Norwegian
        raise ConfigError(f"languages {where} name no, which is false in YAML. To fix, quote it.")
    if len(set(names)) < max(len(names), 1) or (len(names) == 1 and "-" not in names[0]):
        raise ConfigError(
            f"languages {names} {where} are not two or more different ones, or pairs of them. To "
            f"fix, write e.g. [de, en], or [de-en, ar-th]."
        )


def _check_prompt(source: SourceConfig) -> None:
    if source.role is not None and source.kind != "sentences":
        raise ConfigError(
            f"role of data source '{source.name}' is not for kind {source.kind}: its rows say what "
            f"a text is. To fix, remove it."
        )
    prompts = source.prompts
    if unknown := sorted(map(str, set(prompts) - set(source.roles))):
        raise ConfigError(
            f"prompt of data source '{source.name}' names {', '.join(unknown)}; kind "
            f"{source.kind} has {', '.join(source.roles)}. To fix, write one of these, or a text."
        )
    if wrong := [prompt for prompt in prompts.values() if not isinstance(prompt, str)]:
        raise ConfigError(
            f"prompt of data source '{source.name}' is {_shorten(wrong[0])}, not a text. To fix, "
            f'write it in quotes, "" for none.'
        )


def _check_target(l0: schema.L0ModuleConfig) -> None:
    given = [key for key in TARGETS if getattr(l0, key) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"model.l0_module needs exactly one of {', '.join(TARGETS)}, not {len(given)} "
            f"({', '.join(given) or 'none'}). To fix, give one of them."
        )
