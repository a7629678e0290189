"""Load the models whose speed is measured, and return the result.

A model is a folder, a checkpoint, an ONNX file, a hub name, or a configuration: the latter stands
for random weights, so that its speed is known before anything is pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bge_pruning.config.load import ConfigError, load_config
from bge_pruning.evaluation import efficiency
from bge_pruning.evaluation.efficiency import COMPILE, ONNX, RUNTIMES, TORCH
from bge_pruning.evaluation.encoders import check_model_name, load_encoder
from bge_pruning.evaluation.onnx_encoder import OnnxEncoder, find_provider
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.export.onnx_export import FOLDER, MODEL, export_onnx
from bge_pruning.model_io.model_folder import DTYPES, write_model_folder
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.training.plan import Plan, build_plan, example_target
from bge_pruning.utils import environment
from bge_pruning.utils.guard import import_optional
from bge_pruning.workflows.random_model import random_base_model


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        name: Its name on the command line; of a configuration, also which of its shapes it is.
        shape: Sizes of a model of random weights; ``None`` for a model that is loaded by its name.
    """

    name: str
    shape: EncoderShape | None = None

    def onnx_file(self) -> Path | None:
        """Return the existing ONNX file, if there is one."""
        path = Path(self.name)
        if path.suffix == ".onnx":
            return path
        return file if (file := path / FOLDER / MODEL).is_file() else None


def benchmark(
    candidates: Mapping[str, Candidate],
    runtimes: Sequence[str],
    dtype: str,
    device: str,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    texts: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """Check, load, and measure each setting for some seconds, and the texts with their own lengths.

    Returns:
        JSON-ready: names of ``model`` and ``baseline``, ``shapes`` in words and ``parameters`` by
        part of both, the settings, and what is measured.

    Raises:
        ValueError: If this cannot be measured; nothing is measured then.
    """
    check_request(candidates, runtimes, dtype, device)
    with open_models(candidates, runtimes, dtype, device, texts) as opened:
        models = opened[runtimes[0]].items()
        shapes = {name: efficiency.shape_of(encoder) for name, encoder in models}
        with environment.OtherWork() as other:
            found = efficiency.measure_efficiency(opened, batch_sizes, lengths, texts, seconds)
    baseline = candidates.get("baseline")
    versions = {"onnxruntime": version("onnxruntime")} if ONNX in runtimes else {}
    return {
        "model": candidates["model"].name,
        "baseline": baseline and baseline.name,
        "shapes": {name: shape.describe() for name, shape in shapes.items()},
        "parameters": {name: count_parameters(shape).as_dict() for name, shape in shapes.items()},
        "device": device,
        "dtype": dtype,
        "runtimes": list(runtimes),
        "machine": environment.describe_machine(device),
        **found,
        "load": environment.load_note(found["threads"], other.cores),
        "versions": environment.collect_versions() | versions,
    }


def find_candidates(model: str, baseline: str | None = None) -> dict[str, Candidate]:
    """Find the models that a command line names: ``model`` and, if there is one, ``baseline``.

    A configuration stands for random weights of its target shape; the baseline, if none is named,
    is then random weights of its source shape.

    Raises:
        ConfigError: If a configuration is invalid or prunes nothing.
        ValueError: If a name is invalid.
    """
    found = {"model": _find_candidate(model)}
    if baseline is not None:
        found["baseline"] = _find_candidate(baseline)
    elif plan := _plan_of(model):
        found["baseline"] = Candidate(f"{model} (source, random weights)", plan.source)
    return found


def _plan_of(name: str) -> Plan | None:
    return build_plan(load_config([name])) if Path(name).suffix in (".yaml", ".yml") else None


def _find_candidate(name: str) -> Candidate:
    plan = _plan_of(name)
    if plan is None:
        check_model_name(name)
        return Candidate(name)
    target = example_target(plan)
    if target is None:
        raise ConfigError(
            f"{name}: prunes nothing (model.l0_module is null), so it has no smaller shape to "
            f"measure. To fix, name a configuration with a target, or a model."
        )
    return Candidate(f"{name} (target, random weights)", target)


def choose_runtimes(
    candidates: Mapping[str, Candidate], asked: Sequence[str] | None
) -> tuple[str, ...]:
    """Return each runtime once, in the order in which they are measured.

    Without ``asked`` this is ONNX Runtime for an ONNX file, PyTorch otherwise.

    Raises:
        ValueError: If an ONNX file is to run in another runtime.
    """
    files = [c.name for c in candidates.values() if Path(c.name).suffix == ".onnx"]
    if asked is None:
        return (ONNX,) if files else (TORCH,)
    if files and set(asked) != {ONNX}:
        raise ValueError(
            f"{files[0]} runs in ONNX Runtime alone, and runtimes are {', '.join(asked)}. To fix, "
            f"pass --runtimes onnx, or the model's folder in place of the file."
        )
    return tuple(runtime for runtime in RUNTIMES if runtime in asked)


def check_request(
    candidates: Mapping[str, Candidate], runtimes: Sequence[str], dtype: str, device: str
) -> None:
    """Check that a measurement is possible here, before a model is loaded.

    Raises:
        ImportError: If ``onnx`` or ``onnxruntime`` is needed and not installed.
        ValueError: If the device is unavailable, a runtime cannot run on it, ONNX is to have
            another precision, or ``torch.compile`` does not work.
    """
    environment.check_device(device)
    if ONNX in runtimes:
        if dtype != "fp32":
            raise ValueError(
                f"dtype {dtype} is not for the runtime onnx: an ONNX file has its own precision, "
                f"and export writes float32. To fix, leave --dtype or that runtime out."
            )
        find_provider(device, "runtime onnx")
        if any(candidate.onnx_file() is None for candidate in candidates.values()):
            import_optional("onnx", "onnx")
    if COMPILE in runtimes and (reason := environment.compile_failure(device)):
        raise ValueError(
            f"torch.compile does not work on {device} ({reason}). To fix, install a C++ compiler "
            f"(a GPU needs Triton too), or leave compile out of --runtimes."
        )


@contextmanager
def open_models(
    candidates: Mapping[str, Candidate],
    runtimes: Sequence[str],
    dtype: str,
    device: str,
    texts: Sequence[str] = (),
) -> Iterator[dict[str, dict[str, efficiency.Encoder]]]:
    """Load all models for all runtimes; yield encoders by runtime and by the name of the candidate.

    A model without an ONNX file is exported into a temporary folder. The words of ``texts`` are
    tokens of the models of random weights, so that these texts have a natural length.

    Raises:
        ValueError: If a model cannot be loaded or is not an XLM-R model.
    """
    words = list(dict.fromkeys(word for text in texts for word in text.split()))
    opened: dict[str, dict[str, efficiency.Encoder]] = {runtime: {} for runtime in runtimes}
    in_torch = [runtime for runtime in runtimes if runtime != ONNX]
    with TemporaryDirectory(prefix="bge_pruning_") as folder:
        for name, candidate in candidates.items():
            file = candidate.onnx_file()
            base = _load(candidate, words) if in_torch or file is None else None
            if ONNX in runtimes:
                opened[ONNX][name] = OnnxEncoder(file or _export(base, Path(folder) / name), device)
            if in_torch:
                encoder = TextEncoder(base, device)
                encoder.backbone.to(DTYPES[dtype])
                encoder.heads.to(DTYPES[dtype])
                for runtime in in_torch:
                    opened[runtime][name] = encoder
            del base  # where only the exported model is measured, it would take memory
        yield opened


def _load(candidate: Candidate, words: Sequence[str]) -> BaseModel:
    if candidate.shape is not None:
        return random_base_model(candidate.shape, candidate.name, words)
    encoder = load_encoder(candidate.name)
    if not isinstance(encoder, TextEncoder):
        raise ValueError(
            f"{candidate.name}: is no XLM-R model, so its operations cannot be counted. To fix, "
            f"measure it with evaluate_model.py."
        )
    return encoder.base


def _export(base: BaseModel, folder: Path) -> Path:
    folder.mkdir()
    weights = (base.backbone, base.heads, base.shape)
    texts = (base.hf_config, base.tokenizer_files, base.max_seq_length, base.prompts)
    write_model_folder(folder, *weights, *texts, projection=base.projection)
    export_onnx(folder, base)
    return folder / FOLDER / MODEL
