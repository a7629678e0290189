"""Reading, merging and checking configurations."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from bge_pruning.config.load import Config, ConfigError, load_config, to_yaml

TARGET = "model: {l0_module: {target_model: {n_layers: 3}}}\n"


@pytest.fixture
def write(tmp_path):
    """A function that writes a YAML file and returns its path."""

    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_hold_for_what_is_not_given(write):
    config = load_config([write("seed: 1\n")])
    assert config == Config(
        seed=1,
        run_folder="experiments/checkpoints/bge_pruning",
        results_folder="experiments/results/bge_pruning",
    )


# Misspelt keys


@pytest.mark.parametrize(
    ("text", "line", "key", "near"),
    [
        ("seed: 1\nmax_durration: 4ba\n", 2, "max_durration", "max_duration"),
        ("model:\n  dropot: 0.1\n", 2, "model.dropot", "dropout"),
        (
            "model:\n  l0_module:\n    start_sparcity: 0.1\n",
            3,
            "model.l0_module.start_sparcity",
            "start_sparsity",
        ),
        (
            "model:\n  l0_module:\n    target_model:\n      d_model: 24\n      n_head: 3\n",
            5,
            "model.l0_module.target_model.n_head",
            "n_heads",
        ),
        (
            "data:\n  train:\n    - {name: a, kind: sts, path: x}\n    - name: b\n      pth: y\n",
            5,
            "data.train.pth",
            "path",
        ),
        ("loggers:\n  wandb:\n    projekt: x\n", 3, "loggers.wandb.projekt", "project"),
        ("seed: 1\nrecovery:\n  optimizer: {lrr: 1}\n", 3, "recovery.optimizer.lrr", "lr"),
    ],
)
def test_misspelt_key_names_file_line_and_suggestion(text, line, key, near, write):
    path = write(text)
    message = f"{path}:{line}: unknown key '{key}': did you mean '{near}'?"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_config([path])


def test_key_like_no_other_lists_the_known_ones(write):
    with pytest.raises(ConfigError, match=r"unknown key 'zzz': known: autoresume, .*, teacher\."):
        load_config([write("zzz: 1\n")])


def test_misspelt_override(write):
    with pytest.raises(
        ConfigError, match=r"override 'optimizer.lrr=1': unknown key .* mean 'lr'\?"
    ):
        load_config([write("seed: 1\n")], ["optimizer.lrr=1"])


def test_misspelt_key_of_a_file_it_extends_names_that_file(write):
    base = write("seed: 1\nsede: 2\n", "base.yaml")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(base))}:2: unknown key 'sede'"):
        load_config([write("extends: base.yaml\n")])


# Wrong values


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("run_name: a\nseed: many\n", 2, "seed: Value 'many' of type 'str' could not be converted"),
        ("optimizer:\n  lr: fast\n", 2, "optimizer.lr: Value 'fast'"),
        ("model:\n  d_model: 10.5\n", 2, "model.d_model: Value '10.5'"),
        ("dry_run: perhaps\n", 1, "dry_run: Value 'perhaps' is not a valid bool"),
    ],
)
def test_wrong_type_names_file_line_and_key(text, line, message, write):
    path = write(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}:{line}: {message}')}"):
        load_config([path])


@pytest.mark.parametrize(
    "text",
    [
        "model: small\n",
        "loss: 1.0\n",
        "data:\n  train: [x.csv]\n",
        "data:\n  train: x.csv\n",
        "model:\n  l0_module: [head]\n",
        "recovery: [1]\n",
        "extends: 3\n",
    ],
)
def test_a_value_in_place_of_keys_is_a_config_error(text, write):
    with pytest.raises(ConfigError, match="To fix, |cannot be read|unknown key"):
        load_config([write(text)])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage=train", "stage 'train' is not one of"),
        ("scheduler.name=step", "scheduler.name 'step' is not one of"),
        ("precision=fp8", "precision 'fp8' is not one of"),
        ("device=tpu", "device 'tpu' is not one of"),
        ("model.pooling=max", "model.pooling 'max' is not one of"),
        ("data.train=[{name: a, kind: csv, path: b}]", "kind of data source 'a' 'csv'"),
        ("global_train_batch_size=0", "global_train_batch_size 0 is not above 0"),
        ("eval_batch_size=0", "eval_batch_size 0 is not above 0"),
        ("device_train_microbatch_size=0", "device_train_microbatch_size 0 is not above 0"),
        ("checkpoints_to_keep=0", "checkpoints_to_keep 0 is not above 0"),
        ("model.max_length=0", "model.max_length 0 is not above 0"),
        ("evaluation.max_length=0", "evaluation.max_length 0 is not above 0"),
        ("loss.similarity_temperature=0", "loss.similarity_temperature 0.0 is not above 0"),
        ("optimizer.eps=0", "optimizer.eps 0.0 is not above 0"),
        ("seed=-1", "seed -1 is not 0 or more"),
        ("optimizer.lr=-1", "optimizer.lr -1.0 is not 0 or more"),
        ("optimizer.lagrangian_lr=-1", "optimizer.lagrangian_lr -1.0 is not 0 or more"),
        ("loss.sts_regression=-1", "loss.sts_regression -1.0 is not 0 or more"),
        ("model.dropout=1.5", r"model.dropout 1.5 is not in \[0, 1\]"),
        ("scheduler.alpha_f=2", r"scheduler.alpha_f 2.0 is not in \[0, 1\]"),
        ("model.l0_module.start_sparsity=1.1", r"start_sparsity 1.1 is not in \[0, 1\]"),
        ("optimizer.lr=nan", "optimizer.lr nan is not"),
    ],
)
def test_values_out_of_range(override, message, write):
    with pytest.raises(ConfigError, match=f"{message}.*To fix, "):
        load_config([write(TARGET)], [override])


@pytest.mark.parametrize(
    "key",
    [
        "max_duration",
        "eval_interval",
        "save_interval",
        "log_interval",
        "scheduler.t_warmup",
        "model.l0_module.lagrangian_warmup_steps",
    ],
)
def test_time_strings(key, write):
    with pytest.raises(ConfigError, match=f"{key} '100 steps'"):
        load_config([write(TARGET)], [f"{key}=100 steps"])


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("{}", "0 (none)"),
        (
            "{target_density: 0.5, target_parameters: 1.0e+6}",
            "2 (target_parameters, target_density",
        ),
        ("{target_model: {n_layers: 1}, target_density: 0.5}", "2 (target_model, target_density)"),
        ("{target_density: 0.5, target_speedup: 2}", "2 (target_density, target_speedup)"),
    ],
)
def test_exactly_one_target(given, count, write):
    message = "exactly one of target_model, target_parameters, target_density, target_speedup, not "
    with pytest.raises(ConfigError, match=re.escape(message + count)):
        load_config([write(f"model: {{l0_module: {given}}}\n")])


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, 60])
def test_density_is_a_share(density, write):
    with pytest.raises(ConfigError, match=r"is not in \(0, 1\]: it is the share .* write e.g. 0.6"):
        load_config([write(f"model: {{l0_module: {{target_density: {density}}}}}\n")])


@pytest.mark.parametrize("speedup", [1.0, 0.5, 0, -2])
def test_a_speedup_is_above_one(speedup, write):
    with pytest.raises(ConfigError, match=r"is not above 1: it says how many times .* e.g. 2"):
        load_config([write(f"model: {{l0_module: {{target_speedup: {speedup}}}}}\n")])


@pytest.mark.parametrize("length", [0, -1])
def test_a_speedup_is_of_texts(length, write):
    given = f"{{target_speedup: 2, target_length: {length}}}"
    with pytest.raises(ConfigError, match=r"target_length .* is not above 0: .* write e.g. 512"):
        load_config([write(f"model: {{l0_module: {given}}}\n")])


def test_a_source_needs_a_path(write):
    with pytest.raises(ConfigError, match=r"data.train\[0\].path: .*To fix, give the key a value"):
        load_config([write("data: {train: [{name: a, kind: sts}]}\n")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\na: [1\n", r":3: is not YAML \(did not find expected ',' or '\]'\)\. To fix"),
        ("a: {b: 1\n", r":2: is not YAML \(.*\)\. To fix, correct the file"),
        ("a: &a [*a]\n", r":1: is not YAML \(.*recursive.*\)\. To fix, correct the file"),
        ("[" * 100_000, r":1: is not YAML \(nested more than 50 levels deep\)\. To fix"),
        ("? [a]\n: 1\n", r":1: is not YAML \(a list or an object stands where a key does\)"),
        ("a: 1\n", r":1: unknown key 'a'"),
        ("1\n", r": must hold 'key: value' pairs"),
        ("- a\n- b\n", ": must hold 'key: value' pairs"),
        ("just words\n", ": unknown key 'just words'"),
    ],
)
def test_not_a_mapping(text, message, write):
    path = write(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}{message}"):
        load_config([path])


def test_not_utf8(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("run_name: Übung\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml: is not UTF-8\. To fix, convert"):
        load_config([path])


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file. To fix, check the path"):
        load_config([tmp_path / "nowhere.yaml"])
    with pytest.raises(
        ConfigError, match=r"cannot be read \(Is a directory\)\. To fix, name a YAML"
    ):
        load_config([tmp_path])


@pytest.mark.parametrize("override", ["seed", "=3", "max_duration 5ba"])
def test_override_without_key_or_value(override, write):
    with pytest.raises(ConfigError, match=f"override '{override}' is not 'key=value'"):
        load_config([write("seed: 1\n")], [override])


def test_override_that_is_not_yaml(write):
    with pytest.raises(ConfigError, match=r"cannot be read \(.*\)\. To fix, write key=value"):
        load_config([write("seed: 1\n")], ["data.train=[{name: a"])


# Merging


def test_files_merge_left_to_right_then_overrides(write):
    first = write("seed: 1\nmax_duration: 1ba\nrun_name: one\noptimizer: {lr: 1, l0_lr: 1}\n", "1")
    second = write("seed: 2\nmax_duration: 2ba\noptimizer: {lr: 2}\n", "2")
    config = load_config([first, second], ["seed=3", "seed=4"])
    assert (config.seed, config.max_duration, config.run_name) == (4, "2ba", "one")
    assert (config.optimizer.lr, config.optimizer.l0_lr) == (2.0, 1.0)


def test_overrides_reach_everywhere(write):
    config = load_config(
        [write(TARGET)],
        [
            "model.l0_module.target_model.n_layers=2",
            "model.base_model=some/folder",
            "data.train=[{name: a, kind: sts, path: b.csv}]",
            "optimizer.betas=[0.8,0.9]",
            "loggers.wandb.project=mine",
            "run_name=x=y",
        ],
    )
    assert config.model.l0_module.target_model.n_layers == 2
    assert config.model.base_model == "some/folder"
    assert config.data.train[0].path == "b.csv"
    assert config.optimizer.betas == [0.8, 0.9]
    assert config.loggers.wandb.project == "mine"
    assert config.run_folder == "experiments/checkpoints/x=y"


def test_null_takes_a_section_away(write):
    assert load_config([write(TARGET)], ["model.l0_module=null"]).model.l0_module is None


def test_lists_are_replaced_not_joined(write):
    first = write("data: {train: [{name: a, kind: sts, path: a.csv}]}\n", "1")
    second = write("data: {train: [{name: b, kind: sentences, path: b.txt}]}\n", "2")
    assert [source.name for source in load_config([first, second]).data.train] == ["b"]


# extends


def test_extends_is_relative_to_the_file_and_chains(write, monkeypatch, tmp_path):
    write("seed: 1\nmax_duration: 1ba\nrun_name: grand\n", "a/grand.yaml")
    write("extends: ../a/grand.yaml\nseed: 2\nmax_duration: 2ba\n", "b/parent.yaml")
    path = write("extends: [../b/parent.yaml]\nseed: 3\n", "c/child.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config([path])
    assert (config.seed, config.max_duration, config.run_name) == (3, "2ba", "grand")
    assert config.extends == []


def test_several_bases_merge_in_order_before_the_file(write):
    write("seed: 1\nmax_duration: 1ba\n", "1.yaml")
    write("seed: 2\neval_interval: 2ba\n", "2.yaml")
    config = load_config([write("extends: [1.yaml, 2.yaml]\neval_interval: 3ba\n")])
    assert (config.seed, config.max_duration, config.eval_interval) == (2, "1ba", "3ba")


def test_a_file_named_twice_is_no_circle(write):
    write("seed: 1\n", "base.yaml")
    write("extends: base.yaml\n", "left.yaml")
    write("extends: base.yaml\n", "right.yaml")
    assert load_config([write("extends: [left.yaml, right.yaml]\n")]).seed == 1


@pytest.mark.parametrize("name", ["circle.yaml", "deeper/../circle.yaml"])
def test_circle(name, write):
    write("", "deeper/empty.yaml")
    write("extends: circle.yaml\n", "other.yaml")
    path = write("extends: other.yaml\n", "circle.yaml").parent / name
    with pytest.raises(ConfigError, match=r"extends itself through .* To fix, break the circle"):
        load_config([path])


def test_missing_base(write):
    with pytest.raises(ConfigError, match=r"missing.yaml: no such file"):
        load_config([write("extends: missing.yaml\n")])


# stage and recovery

RECOVERY = TARGET + "recovery: {max_duration: 7ba, optimizer: {lr: 0.5}}\n"


def test_a_baseline_recovers_for_the_steps_of_both_stages(write):
    path = write(TARGET + "max_duration: 30ba\nrecovery: {max_duration: 7ba}\n")
    lengths = {
        (method, stage): load_config([path], [f"method={method}", f"stage={stage}"]).max_duration
        for method in ("l0", "layers", "random")
        for stage in ("prune", "recover")
    }
    assert lengths["l0", "prune"] == "30ba" and lengths["l0", "recover"] == "7ba"
    assert lengths["layers", "recover"] == lengths["random", "recover"] == "37ba"
    alike = write(TARGET + "max_duration: 30ba\n")  # l0 recovers for as long as it prunes
    assert load_config([alike], ["method=random", "stage=recover"]).max_duration == "60ba"


def test_times_of_different_units_have_no_sum(write):
    path = write(TARGET + "max_duration: 30ba\nrecovery: {max_duration: 1ep}\n")
    load_config([path], ["stage=recover"])
    message = r"max_duration 30ba and recovery\.max_duration 1ep have different units.* To fix, g"
    with pytest.raises(ConfigError, match=message):
        load_config([path], ["method=random", "stage=recover"])


def test_the_method_is_that_of_the_whole_run(write):
    path = write(TARGET + "recovery: {method: random}\n")
    with pytest.raises(ConfigError, match=r"recovery\.method cannot differ from the pruning run's"):
        load_config([path])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=taylor", r"method 'taylor' is not one of .*'magnitude'.* To fix, choose one"),
        (
            "baseline.layer_choice=worst",
            r"layer_choice 'worst' is not one of \('best', 'every_nth'",
        ),
        ("baseline.calibration_texts=0", r"baseline\.calibration_texts 0 is not above 0"),
    ],
)
def test_methods_that_are_none(override, message, write):
    with pytest.raises(ConfigError, match=message):
        load_config([write(TARGET)], [override])


def test_recovery_keys_wait_for_their_stage(write):
    config = load_config([write(RECOVERY)])
    assert (config.max_duration, config.optimizer.lr) == ("15000ba", 1e-4)


def test_stage_recover_trains_the_extracted_model(write):
    path = write(RECOVERY + "run_name: r\nresults_folder: res/${run_name}\n")
    overrides = ["model.d_model=32", "model.vocab_size=99", "model.revision=abc", "stage=recover"]
    config = load_config([path], overrides)
    assert (config.max_duration, config.optimizer.lr) == ("7ba", 0.5)
    assert config.model.base_model == str(Path("res/r/pruned_model"))
    assert config.model.l0_module is None
    assert config.run_folder == "experiments/checkpoints/r-recovery"
    assert config.results_folder == "res/r"
    sizes = ("d_model", "n_heads", "n_layers", "intermediate_size", "vocab_size", "revision")
    assert {getattr(config.model, size) for size in sizes} == {None}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{optimizer: {lr: fast}}", "recovery: optimizer.lr: Value 'fast'"),
        ("{optimizer: {lr: -1}}", "optimizer.lr -1.0 is not 0 or more"),
        ("{scheduler: {name: step}}", "scheduler.name 'step' is not one of"),
        ("{optimizr: {lr: 1}}", "unknown key 'recovery.optimizr'|unknown key 'optimizr'"),
    ],
)
def test_recovery_is_checked_before_pruning(section, message, write):
    with pytest.raises(ConfigError, match=message):
        load_config([write(TARGET + f"recovery: {section}\n")])


# Round trip


@pytest.mark.parametrize("stage", ["prune", "recover"])
def test_yaml_round_trip(stage, write):
    text = RECOVERY + "data: {train: [{name: a, kind: sts, path: b}]}\nloggers: {wandb: {}}\n"
    config = load_config([write(text)], [f"stage={stage}", "run_name=ü"])
    written = to_yaml(config)
    assert yaml.safe_load(written) == asdict(config)


def test_written_config_can_be_run_again(write):
    config = load_config([write(RECOVERY)])
    assert load_config([write(to_yaml(config), "again.yaml")]) == config
