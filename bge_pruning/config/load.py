"""Load a typed configuration (:mod:`bge_pruning.config.schema`) from YAML files and overrides.

Files are merged left to right, then ``key=value`` overrides. A file may name files that it builds
on under ``extends`` (relative to itself). An unknown key, a wrong type or a value out of range is
an error that names the file, the line and the key.

The C parser overflows the stack of the process where brackets are nested deeply, and a few lines of
anchors can stand for billions of values. Neither raises an error that could be caught.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bge_pruning.config.checks import check, check_schedule
from bge_pruning.config.content import Origin, check_content
from bge_pruning.config.data_checks import check_passages, mixture_ends
from bge_pruning.config.names import DATA_FOLDER, L0, SIZE_ALIASES, SIZES, TARGETS
from bge_pruning.config.schema import Config, ConfigError
from bge_pruning.config.shipped import find_config

MAX_DEPTH = 50
MAX_VALUES = 100_000
# Keys whose change would send the recovery to another place than where its model is written.
OF_BOTH_STAGES = "method stage dry_run run_name run_folder results_folder extends recovery".split()


class YamlTextError(ValueError):
    """Raised for a text that is not YAML; ``line`` counts from 1 and may be unknown."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def check_yaml(text: str) -> None:
    """Refuse a YAML document that cannot be parsed, or not without harm.

    Raises:
        YamlTextError: If it is not YAML, is nested too deep, or stands for too many values.
    """
    open_sizes, sizes, anchors = [0], {}, [None]
    try:
        # Events come one by one; nothing here recurses.
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.CollectionStartEvent):
                if len(open_sizes) > MAX_DEPTH:
                    raise YamlTextError(f"nested more than {MAX_DEPTH} levels deep", line)
                open_sizes.append(1)
                anchors.append(event.anchor)
            elif isinstance(event, yaml.CollectionEndEvent):
                size = open_sizes.pop()
                sizes[anchors.pop()] = size
                open_sizes[-1] += size
            elif isinstance(event, yaml.AliasEvent):
                open_sizes[-1] += sizes.get(event.anchor, 1)
            elif isinstance(event, yaml.ScalarEvent):
                sizes[event.anchor] = 1
                open_sizes[-1] += 1
            if open_sizes[-1] > MAX_VALUES:
                raise YamlTextError(f"holds more than {MAX_VALUES:,} values", line)
    except yaml.YAMLError as error:
        raise describe_yaml_error(error) from None


def describe_yaml_error(error: yaml.YAMLError) -> YamlTextError:
    """Turn the parser's error into one line of text with the line of the file."""
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None)
    words = " ".join(str(reason or error).split())
    if words == "found unhashable key":
        words = "a list or an object stands where a key does"
    return YamlTextError(words, None if mark is None else mark.line + 1)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Say in a line which value OmegaConf cannot find: one may stand for another, as ``${key}``."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key}: {_first_line(error).rstrip('.')}. To fix, give the key a value."
        ) from None


@_plain_errors()
def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a run's configuration; a recovery gets its ``recovery`` keys.

    Args:
        paths: YAML files or names of shipped ones, merged left to right, each after the files it
            ``extends``.
        overrides: ``key=value`` strings, applied last.

    Raises:
        ConfigError: If a file cannot be read, or a key or value is wrong.
    """
    merged = OmegaConf.structured(Config)
    for path in paths:
        for file in _with_bases(find_config(path), ()):
            content = _read_yaml(file)
            _clear_targets(merged, [content])
            merged = _merge(merged, content, Origin(str(file), file))
    contents = [_parse_override(override) for override in overrides]
    _clear_targets(merged, contents)
    for override, content in zip(overrides, contents, strict=True):
        merged = _merge(merged, content, Origin(f"override '{override}'"))
    merged.extends = []
    for key in OF_BOTH_STAGES:
        if key in (merged.recovery or {}):
            raise ConfigError(
                f"recovery.{key} cannot differ from the pruning run's. To fix, remove it: a "
                f"recovery starts from RESULTS/pruned_model and writes to RUN_FOLDER-recovery."
            )
    recovering = _merge(merged, OmegaConf.create(merged.recovery or {}), Origin("recovery"))
    recovery, pruning = OmegaConf.to_object(recovering), OmegaConf.to_object(merged)
    recovery.stage = "recover"
    for config in (pruning, recovery):
        check(config)
        check_passages(config)
    _make_recovery(recovery, pruning.max_duration)
    config = recovery if merged.stage == "recover" else pruning
    for stage in (config, recovery):  # which a pruning run is followed by
        check_schedule(stage)
        mixture_ends(stage)
    return config


def _clear_targets(base: DictConfig, contents: Sequence[DictConfig]) -> None:
    """Take the target out of ``base``, in place, where contents that follow set another one."""
    given = set()
    for content in contents:
        part: Any = OmegaConf.to_container(content, resolve=False)
        for key in ("model", "l0_module"):
            part = part.get(key) if isinstance(part, dict) else None
        given |= {key for key in TARGETS if isinstance(part, dict) and part.get(key) is not None}
    if given and base.model.l0_module is not None:
        base.model.l0_module.update(dict.fromkeys(set(TARGETS) - given))


def _make_recovery(config: Config, pruning: str) -> None:
    """Turn the configuration of a pruning run into that of its recovery, in place.

    The model is the extracted one, without gates and with the heads that were trained, and its
    teacher is the model it came from; its sizes are no longer those that the YAML names. A baseline
    is cut without any step of training, so its recovery has the steps of l0's pruning too: methods
    are compared at equal steps.
    """
    if config.method != L0:
        recovery, unit = config.max_duration, pruning[-2:]
        if recovery[-2:] != unit:
            raise ConfigError(
                f"max_duration {pruning} and recovery.max_duration {recovery} have different "
                f"units: a baseline recovers for the sum of both. To fix, give both in ba "
                f"(batches)."
            )
        config.max_duration = f"{int(pruning[:-2]) + int(recovery[:-2])}{unit}"
    config.model.base_model = str(pruned_model_folder(config))
    config.data.adapt_weights_interval = None  # it follows what the gates do
    for key in ("revision", "l0_module", "colbert_dim", *SIZES):
        setattr(config.model, key, None)
    config.model.replace_heads = False
    config.run_folder = f"{config.run_folder}-recovery"


def pruned_model_folder(config: Config) -> Path:
    """Folder of the model that is extracted from a pruning run."""
    return Path(config.results_folder) / "pruned_model"


def to_yaml(config: Config) -> str:
    """The configuration as YAML, every key written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file that is not the configuration of a run."""
    return OmegaConf.to_container(_read_yaml(path))


def _with_bases(path: Path, seen: tuple[Path, ...]) -> list[Path]:
    """The files a YAML builds on, then itself."""
    if path in seen:
        raise ConfigError(
            f"{path}: extends itself through {', '.join(map(str, seen))}. To fix, break the circle."
        )
    bases = _read_yaml(path).get("extends") or []
    if not isinstance(bases, Sequence) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"{path}: extends is {bases!r}, expected a file or a list of files. To fix, "
            f"write e.g. extends: base.yaml."
        )
    files = [f for base in bases for f in _with_bases(path.parent / base, (*seen, path))]
    return [*files, path]


def _read_yaml(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. To fix, check the path.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8. To fix, convert the file.") from None
    except (OSError, ValueError) as error:  # a name may hold a null byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason}). To fix, name a YAML file.") from None
    content = _parse_yaml(text, str(path))
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: must hold 'key: value' pairs. To fix, see configs/.")
    if isinstance(content.get("extends"), str):
        content.extends = [content.extends]
    return content


def _parse_yaml(text: str, path: str) -> Any:
    """The content of a file; errors name the line."""
    try:
        check_yaml(text)
        return _with_our_names(OmegaConf.load(StringIO(text)), path)
    except (YamlTextError, yaml.YAMLError) as caught:
        error = describe_yaml_error(caught) if isinstance(caught, yaml.YAMLError) else caught
        where = path if error.line is None else f"{path}:{error.line}"
        raise ConfigError(f"{where}: is not YAML ({error}). To fix, correct the file.") from None
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{path}: cannot be read ({_first_line(error)}). To fix, correct the file."
        ) from None
    except (OSError, ValueError, TypeError) as error:  # e.g. a text alone, or a number of digits
        raise ConfigError(
            f"{path}: must hold 'key: value' pairs ({_first_line(error)}). To fix, see configs/."
        ) from None


def _parse_override(text: str) -> DictConfig:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override '{text}' is not 'key=value'. To fix, write e.g. seed=1.")
    try:
        check_yaml(value)
        return _with_our_names(OmegaConf.from_dotlist([text]), f"override '{text}'")
    except (yaml.YAMLError, YamlTextError, OmegaConfBaseException, ValueError) as error:
        reason = describe_yaml_error(error) if isinstance(error, yaml.YAMLError) else error
        raise ConfigError(
            f"override '{text}' cannot be read ({_first_line(reason)}). To fix, write key=value, "
            f"as in seed=1 or data.train=[]."
        ) from None


def _with_our_names(content: Any, where: str) -> Any:
    """Give sizes that have Hugging Face's names ours, and keep the paths of data as written.

    A path below the folder that the environment names is recorded so: data may move.
    """

    def renamed(part: Any) -> Any:
        if isinstance(part, list):
            return [renamed(item) for item in part]
        if not isinstance(part, dict):
            return part
        for theirs, ours in SIZE_ALIASES.items():
            if theirs in part and ours in part:
                raise ConfigError(
                    f"{where}: {theirs} and {ours} are the same size. To fix, remove one of them."
                )
        path = part.get("path")
        if isinstance(path, str) and path.startswith(DATA_FOLDER):
            part = {**part, "path": f"\\{path}"}  # which OmegaConf does not look up
        return {SIZE_ALIASES.get(key, key): renamed(value) for key, value in part.items()}

    if not isinstance(content, DictConfig):
        return content
    return OmegaConf.create(renamed(OmegaConf.to_container(content, resolve=False)))


def _first_line(error: Exception) -> str:
    """The message of an error, without the details that OmegaConf writes below it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _merge(base: DictConfig, extra: DictConfig, origin: Origin) -> DictConfig:
    check_content(OmegaConf.to_container(extra, resolve=False), Config, (), origin)
    try:
        return OmegaConf.merge(base, extra)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise ConfigError(
            f"{origin.at(tuple(key.split('.')))}: {key}: {_first_line(error).rstrip('.')}. "
            f"To fix, see this key in bge_pruning/config/schema.py."
        ) from None
