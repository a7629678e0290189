"""Every YAML under configs/: loads, is what its name and its first lines say, can be served."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from bge_pruning.config.command_checks import check_objective
from bge_pruning.config.load import load_config
from bge_pruning.models.encoder_shape import check_exportable, count_parameters
from bge_pruning.training.plan import build_plan
from bge_pruning.training.plan_text import render_plan

ROOT = Path(__file__).parents[2]
# A study is a grid of configurations, see tests/test_study_file.py.
STUDIES = sorted((ROOT / "configs").rglob("study*.yaml"))
FILES = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path not in STUDIES]
BGE_M3 = [path for path in FILES if path.parent.name == "bge_m3"]
SMALL = [path for path in FILES if path.parent.name == "m3_small" and path.stem != "heads"]
PRESETS = [path for path in BGE_M3 + SMALL if path.stem not in ("quickstart", "scores")]
TRAINING = [path for path in FILES if path.parent.name == "training"]
ENCODER = 302_309_376
# What may differ between BGE-M3 and the model on which its recipe is tried: the model, its sizes,
# lengths of texts and of runs, and what a CPU cannot do.
SIZES = "d_model n_heads n_layers intermediate_size vocab_size".split()
TARGET = [f"model.l0_module.target_model.{size}" for size in SIZES]
LENGTHS = "max_duration eval_interval save_interval log_interval".split()
OWN = {"run_name", "run_folder", "results_folder", "precision", "global_train_batch_size"}
OWN |= {f"model.{key}" for key in ("base_model", "pooling", "max_length", *SIZES)} | {*TARGET}
OWN |= {*LENGTHS, *(f"recovery.{key}" for key in LENGTHS)}
# What a plan without the model's folder takes from BGE-M3.
REST_OF_M3_SMALL = {"max_position_embeddings": 514, "pooler": False, "colbert_dim": 128}
# What a run of few steps needs: gates that decide in them, fewer texts to choose and to fit on.
FEW_STEPS = {f"model.l0_module.{key}" for key in ("init_mean", "init_std", "binarization")}
FEW_STEPS |= {"model.l0_module.lagrangian_warmup_steps", "baseline.calibration_texts"}
FEW_STEPS |= {f"optimizer.{key}" for key in ("l0_lr", "lagrangian_lr", "lambda_2_lr")}
FEW_STEPS |= {"scheduler.t_warmup", "scheduler.alpha_f", "recovery.scheduler.alpha_f"}
FEW_STEPS |= {"recovery.optimizer.lr", "recovery.teacher.refit_texts"}
FEW_STEPS |= {"recovery.global_train_batch_size"}


def ids(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def target_of(path: Path):
    return build_plan(load_config([path])).target


def leaves(content: object, prefix: str = "") -> Iterator[str]:
    if not isinstance(content, dict):
        yield prefix.removeprefix(".")
        return
    for key, value in content.items():
        yield from leaves(value, f"{prefix}.{key}")


def values(content: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every key with its value; a list is one value."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_all_are_here():
    presets = ("75pct", "60pct", "50pct", "203m", "162m", "135m")
    training = ("mixed", "mteb_only", "multilingual", "sts_only")
    expected = {"bge_m3/base", *(f"bge_m3/target_{preset}" for preset in presets)}
    expected |= {"minilm/quickstart", *(f"training/{name}" for name in training)}
    small = ("base", "target_75pct", "target_60pct", "target_50pct", "quickstart", "heads")
    expected |= {f"m3_small/{name}" for name in small}
    assert {ids(path) for path in FILES} >= expected


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_loads_and_its_header_says_what_how_and_what_it_cost(path):
    config = load_config([path])
    load_config([path], ["max_duration=1000ba", "recovery.max_duration=1000ba"])
    assert config.data.train
    assert not config.overwrite  # only who starts a run may say that an earlier one goes
    assert any(vars(config.loss).values())
    for source in [*config.data.train, *config.data.eval] if path not in TRAINING else ():
        if source.kind == "beir":
            assert (ROOT / source.path / "qrels" / f"{source.split}.tsv").is_file()
        else:
            assert list(ROOT.glob(source.path.replace("{language}", "*")))
    text = header(path)
    launches = [line for line in text.splitlines() if line.startswith(("composer ", "python "))]
    assert launches, "no launch line"
    named = [part for line in launches for part in shlex.split(line) if part.endswith(".yaml")]
    assert str(path.relative_to(ROOT)) in named
    for line in launches:
        for part in shlex.split(line):
            if part.endswith((".yaml", ".py", ".csv")):
                assert (ROOT / part).is_file(), part
        if line.startswith("composer "):
            load_config([ROOT / part for part in shlex.split(line) if part.endswith(".yaml")])
    assert re.search(r"measured", text, re.IGNORECASE)


@pytest.mark.parametrize("path", BGE_M3, ids=ids)
def test_renders_a_plan_alone_without_a_network(path, monkeypatch):
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a plan needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir("/")
    config = load_config([path])
    plan = build_plan(config)
    text = render_plan(plan, config)
    assert f"{ENCODER:,}" in text
    assert f"{count_parameters(plan.target).encoder:,}" in text
    check_objective(config)
    # It can be served, and keeps tensor cores busy.
    check_exportable(plan.target, plan.source)
    assert plan.target.hidden_size == 64 * plan.target.num_attention_heads
    for size in (plan.target.hidden_size, plan.target.intermediate_size):
        assert size % 64 == 0


@pytest.mark.parametrize("path", [p for p in PRESETS if p.stem != "base" or p in BGE_M3], ids=ids)
def test_name_and_header_say_the_computed_sizes(path, monkeypatch):
    monkeypatch.chdir("/")  # where no model is prepared
    plan = build_plan(load_config([path]))
    target = replace(plan.target, **(REST_OF_M3_SMALL if path in SMALL else {}))
    counts, unpruned = count_parameters(target), count_parameters(plan.source).encoder
    encoder = counts.encoder
    if found := re.fullmatch(r"target_(\d+)pct", path.stem):
        wanted = unpruned * int(found[1]) / 100
    elif found := re.fullmatch(r"target_(\d+)m", path.stem):
        wanted = int(found[1]) * 1e6
    else:
        wanted = 127.6e6
    assert encoder == pytest.approx(wanted, rel=0.002)
    text = header(path)
    millions = [float(n) for n in re.findall(r"([\d.]+)M\b", text)]
    percent = [float(n) for n in re.findall(r"([\d.]+) %", text)]
    # "203M encoder parameters" is the preset's name; its count may be 0.2 % off.
    assert millions[0] == pytest.approx(counts.encoder / 1e6, rel=0.002)
    # In all: as dense, sparse and multi-vector model, with its pooler if it has one.
    assert millions[1] == pytest.approx(counts.total / 1e6, abs=1.0)
    assert percent[0] == pytest.approx(100 * counts.encoder / unpruned, abs=0.5)


def test_base_is_the_published_plans_example():
    config = load_config([ROOT / "configs/bge_m3/base.yaml"])
    sizes = {"d_model": 768, "n_heads": 12, "n_layers": 18, "intermediate_size": 3072}
    assert vars(config.model.l0_module.target_model) == sizes | {"vocab_size": 250_002}
    assert config.model.name == "composer_bge_m3"
    assert config.model.base_model == "BAAI/bge-m3"
    assert (config.max_duration, config.eval_interval) == ("15000ba", "500ba")
    shape = target_of(ROOT / "configs/bge_m3/base.yaml")
    assert (shape.hidden_size, shape.num_attention_heads) == (768, 12)
    assert (shape.num_hidden_layers, shape.intermediate_size) == (18, 3072)


def test_presets_differ_in_target_and_name_alone():
    assert len({target_of(path) for path in PRESETS}) == len(PRESETS)
    for path in PRESETS:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = {key for key in leaves(raw) if ".target_model." not in key}
        assert changed == {"extends", "run_name"} or path.stem == "base"


@pytest.mark.parametrize("name", ["base", "target_75pct", "target_60pct", "target_50pct"])
def test_the_small_model_is_pruned_as_bge_m3_is(name):
    """By the same recipe, to the same share of each axis, as far as sizes allow."""
    found = [load_config([f"{folder}/{name}"]) for folder in ("bge_m3", "m3_small")]
    large, small = (dict(values(asdict(config))) for config in found)
    assert {key for key in large | small if large.get(key) != small.get(key)} <= OWN
    shares = [
        np.divide(
            [c[key] for key in TARGET],
            [c[key.replace(".l0_module.target_model", "")] for key in TARGET],
        )
        for c in (large, small)
    ]
    np.testing.assert_allclose(*shares, atol=0.05)


def test_the_quickstart_is_the_small_preset_in_few_steps():
    """With another shape of the same size."""
    paths = [ROOT / f"configs/m3_small/{name}.yaml" for name in ("target_50pct", "quickstart")]
    preset, short = (dict(values(asdict(load_config([path])))) for path in paths)
    differ = {key for key in preset | short if preset.get(key) != short.get(key)}
    assert differ <= OWN | FEW_STEPS
    of_preset, of_short = (count_parameters(target_of(path)).encoder for path in paths)
    assert of_short == pytest.approx(of_preset, rel=0.01)


def test_model_and_training_files_own_disjoint_keys():
    def owned(paths: list[Path]) -> dict[str, str]:
        raw = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths}
        ignored = ("extends", "run_name")
        return {k: ids(p) for p, c in raw.items() for k in leaves(c) if k not in ignored}

    model, training = owned(BGE_M3), owned(TRAINING)
    assert not {k: (model[k], training[k]) for k in model.keys() & training.keys()}


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_losses_and_data_fit(path):
    length = "model.max_length=512"  # that of BGE-M3, which passages are cut for
    check_objective(load_config([ROOT / "configs/minilm/quickstart.yaml", path], [length]))
