"""Reading, merging and checking configurations."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from bge_pruning.config import load
from bge_pruning.config.load import Config, ConfigError, YamlTextError, check_yaml, load_config
from bge_pruning.config.names import TARGETS

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
    expected = Config(seed=1, run_folder="experiments/checkpoints/bge_pruning")
    expected.results_folder = "experiments/results/bge_pruning"
    assert load_config([write("seed: 1\n")]) == expected


SIZES = "model:\n  l0_module:\n    target_model:\n      d_model: 24\n      n_head: 3\n"
DATA = "data:\n  train:\n    - {name: a, kind: sts, path: x}\n    - name: b\n      pth: y\n"


@pytest.mark.parametrize(
    ("text", "line", "key", "near"),
    [
        ("seed: 1\nmax_durration: 4ba\n", 2, "max_durration", "max_duration"),
        ("model:\n  dropot: 0.1\n", 2, "model.dropot", "dropout"),
        (SIZES, 5, "model.l0_module.target_model.n_head", "n_heads"),
        (DATA, 5, "data.train.pth", "path"),
        ("loggers:\n  wandb:\n    projekt: x\n", 3, "loggers.wandb.projekt", "project"),
        ("seed: 1\nrecovery:\n  optimizer: {lrr: 1}\n", 3, "recovery.optimizer.lrr", "lr"),
    ],
)
def test_misspelt_key_names_file_line_and_suggestion(text, line, key, near, write):
    path = write(text)
    message = f"{path}:{line}: unknown key '{key}': did you mean '{near}'?"
    for file in (path, write("extends: run.yaml\n", "child.yaml")):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            load_config([file])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zzz=1", r"unknown key 'zzz': known: autoresume, .*, teacher\."),
        ("optimizer.lrr=1", r"override 'optimizer.lrr=1': unknown key .* mean 'lr'\?"),
        ("seed", "override 'seed' is not 'key=value'"),
        ("=3", "override '=3' is not 'key=value'"),
        ("max_duration 5ba", "override 'max_duration 5ba' is not 'key=value'"),
        ("data.train=[{name: a", r"cannot be read \(.*\)\. To fix, write key=value"),
    ],
)
def test_refused_overrides(override, message, write):
    with pytest.raises(ConfigError, match=message):
        load_config([write("seed: 1\n")], [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_name: a\nseed: many\n", ":2: seed must be a whole number, not 'many'. To fix"),
        ("optimizer:\n  lr: fast\n", ":2: optimizer.lr must be a number, not 'fast'. To fix"),
        ("model:\n  d_model: 10.5\n", ":2: model.d_model must be a whole number, not 10.5. To fix"),
        ("dry_run: perhaps\n", ":1: dry_run must be true or false, not 'perhaps'. To fix"),
        ("seed: 1\na: [1\n", r":3: is not YAML \(did not find expected ',' or '\]'\)\. To fix"),
        ("a: {b: 1\n", r":2: is not YAML \(.*\)\. To fix, correct the file"),
        ("a: &a [*a]\n", r":1: is not YAML \(.*recursive.*\)\. To fix, correct the file"),
        ("[" * 100_000, r":1: is not YAML \(nested more than 50 levels deep\)\. To fix"),
        ("? [a]\n: 1\n", r":1: is not YAML \(a list or an object stands where a key does\)"),
        ("a: 1\n", r":1: unknown key 'a'"),
        ("1\n", r": must hold 'key: value' pairs"),
        ("- a\n- b\n", ": must hold 'key: value' pairs"),
        ("just words\n", ": unknown key 'just words'"),
        ("extends: missing.yaml\n", r"^.*missing\.yaml: no such file"),
    ],
)
def test_files_that_cannot_be_read(text, message, write):
    path = write(text)
    where = "" if message.startswith("^") else f"^{re.escape(str(path))}"
    with pytest.raises(ConfigError, match=f"{where}{message}"):
        load_config([path])


def test_paths_that_cannot_be_read(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("run_name: Übung\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml: is not UTF-8\. To fix, convert"):
        load_config([path])
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file. To fix, check the path"):
        load_config([tmp_path / "nowhere.yaml"])
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)\. To fix, name a Y"):
        load_config([tmp_path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed:", "seed must be a whole number and is empty. To fix, write e.g. 17."),
        ("seed: true", "seed must be a whole number, not True."),
        ("seed: [1]", "seed must be a whole number, not [1]."),
        ("run_name: [a]", "run_name must be a text, not ['a']."),
        ("model: small", "model must be keys with values, not 'small'. To fix, write e.g. {"),
        ("loss: 1.0", "loss must be keys with values, not 1.0."),
        ("model: {l0_module: [head]}", "model.l0_module must be keys with values, not ['head']."),
        ("data: {train: x.csv}", "data.train must be a list, not 'x.csv'. To fix, write e.g. ["),
        ("data: {train: {name: x}}", "data.train must be a list, not {'name': 'x'}."),
        ("data: {train: [x.csv]}", "an item of data.train must be keys with values, not 'x.csv'."),
        ("data: {train: }", "data.train must be a list and is empty."),
        ("recovery: {data: {train: x}}", "recovery.data.train must be a list, not 'x'."),
        ("evaluation: {modes: dense}", "evaluation.modes must be a list, not 'dense'."),
        ("optimizer: {betas: [a, b]}", "an item of optimizer.betas must be a number, not 'a'."),
        # Keys without the part that they belong to
        ("base_model: x", "unknown key 'base_model': did you mean 'model.base_model' or 't"),
        ("target_density: 1", "unknown key 'target_density': did you mean 'model.l0_module."),
        ("train: [a]", "unknown key 'train': did you mean 'data.train'?"),
        ("recovery: {lr: 1}", "unknown key 'recovery.lr': did you mean 'recovery.optimizer.lr'?"),
    ],
)
def test_what_is_of_another_kind_or_in_another_place(text, message, write):
    path = write(f"{text}\n")
    for file in (path, write("extends: run.yaml\n", "child.yaml")):
        with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}:1: {message}')}"):
            load_config([file])


@pytest.mark.parametrize("value", ["'3'", "${eval_batch_size}", "0x10"])
def test_values_that_are_read_as_numbers(value, write):
    assert load_config([write(f"seed: {value}\n")]).seed in (3, 64, 16)


@pytest.mark.parametrize("text", ["recovery: [1]", "extends: 3"])
def test_a_value_in_place_of_keys_is_a_config_error(text, write):
    with pytest.raises(ConfigError, match="To fix, "):
        load_config([write(text)])


# What YAML may cost before it is parsed


@pytest.mark.parametrize(
    "text",
    ["", "a: 1\n", "- [1, {b: c}]\n", "x: &x [1, 2]\ny: *x\n", "[" * 50 + "]" * 50, "a: *b\n"],
)
def test_ordinary_text_passes(text):
    check_yaml(text)  # the parser finds an alias that is unknown


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused_not_parsed(opening):
    """The C parser would end the process."""
    with pytest.raises(YamlTextError, match=f"nested more than {load.MAX_DEPTH} levels deep"):
        check_yaml(opening * 100_000)


def test_anchors_that_multiply_are_refused():
    lines = ["a0: &a0 [" + ", ".join("x" * 10) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 30)]
    with pytest.raises(
        YamlTextError, match=f"holds more than {load.MAX_VALUES:,} values"
    ) as caught:
        check_yaml("\n".join(lines))
    assert caught.value.line < 8


@pytest.mark.parametrize(("text", "line"), [("a: 1\nb: [\n", 3), ("\x00", None)])
def test_a_text_that_is_not_yaml(text, line):
    with pytest.raises(YamlTextError) as caught:
        check_yaml(text)
    assert caught.value.line == line
    assert len(str(caught.value).splitlines()) == 1


# Merging


@pytest.mark.parametrize("key", ["recovery", "model", "model.l0_module", "data", "stage", "seed"])
def test_a_value_that_stands_for_an_unknown_one(key, write):
    message = rf"^{key}: Interpolation key 'x' not found\. To fix, give the key a value\.$"
    with pytest.raises(ConfigError, match=message):
        load_config([write("seed: 1\n")], [f"{key}=${{x}}"])


def test_files_merge_left_to_right_then_overrides(write):
    one = "data: {train: [{name: a, kind: sts, path: a.csv}]}\noptimizer: {lr: 1, l0_lr: 1}\n"
    two = "data: {train: [{name: b, kind: sentences, path: b.txt}]}\noptimizer: {lr: 2}\n"
    first = write("seed: 1\nmax_duration: 1ba\nrun_name: one\n" + one, "1")
    second = write("seed: 2\nmax_duration: 2ba\n" + two, "2")
    config = load_config([first, second], ["seed=3", "seed=4"])
    assert (config.seed, config.max_duration, config.run_name) == (4, "2ba", "one")
    assert (config.optimizer.lr, config.optimizer.l0_lr) == (2.0, 1.0)
    assert [source.name for source in config.data.train] == ["b"]  # lists are not joined


def test_sizes_may_have_hugging_faces_names(write):
    text = "model: {hidden_size: 64, l0_module: {target_model: {num_hidden_layers: 2}}}\n"
    config = load_config([write(text)], ["model.l0_module.target_model.num_attention_heads=4"])
    assert config.model.d_model == 64
    target = config.model.l0_module.target_model
    assert (target.n_layers, target.n_heads) == (2, 4)
    with pytest.raises(ConfigError, match="hidden_size and d_model are the same size. To fix, rem"):
        load_config([write("model: {d_model: 64, hidden_size: 64}\n")])


def test_overrides_reach_everywhere(write):
    overrides = [
        "model.l0_module.target_model.n_layers=2",
        "model.base_model=some/folder",
        "data.train=[{name: a, kind: sts, path: b.csv}]",
        "optimizer.betas=[0.8,0.9]",
        "loggers.wandb.project=mine",
        "run_name=x=y",
    ]
    config = load_config([write(TARGET)], overrides)
    assert config.model.l0_module.target_model.n_layers == 2
    assert config.model.base_model == "some/folder"
    assert config.data.train[0].path == "b.csv"
    assert config.optimizer.betas == [0.8, 0.9]
    assert config.loggers.wandb.project == "mine"
    assert config.run_folder == "experiments/checkpoints/x=y"
    assert load_config([write(TARGET)], ["model.l0_module=null"]).model.l0_module is None


@pytest.mark.parametrize(
    "target",
    ["target_density=0.5", "target_speedup=2", "target_parameters=1e6", "target_model.n_layers=2"],
)
@pytest.mark.parametrize("before", ["target_model: {n_layers: 3}", "target_density: 0.7"])
def test_a_target_takes_the_place_of_an_earlier_one(target, before, write):
    write(f"model: {{l0_module: {{{before}, init_std: 0.5}}}}\n", "base.yaml")
    name, value = target.replace(".n_layers=2", "={n_layers: 2}").split("=")
    child = write(f"extends: base.yaml\nmodel: {{l0_module: {{{name}: {value}}}}}\n", "child.yaml")
    override = f"model.l0_module.{target}"
    whole = f"model={{l0_module: {{{name}: {value}, target_length: 128}}}}"
    base = child.with_name("base.yaml")
    for arguments in (([child], []), ([base], [override]), ([base], ["seed=1", whole])):
        l0 = load_config(*arguments).model.l0_module
        assert [key for key in TARGETS if getattr(l0, key) is not None] == [name]
        assert l0.init_std == 0.5


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
    write("seed: 1\nmax_duration: 1ba\n", "0.yaml")
    write("extends: 0.yaml\n", "1.yaml")
    write("extends: 0.yaml\nseed: 2\neval_interval: 2ba\n", "2.yaml")  # twice is not a circle
    config = load_config([write("extends: [1.yaml, 2.yaml]\neval_interval: 3ba\n")])
    assert (config.seed, config.max_duration, config.eval_interval) == (2, "1ba", "3ba")


@pytest.mark.parametrize("name", ["circle.yaml", "deeper/../circle.yaml"])
def test_circle(name, write):
    write("", "deeper/empty.yaml")
    write("extends: circle.yaml\n", "other.yaml")
    path = write("extends: other.yaml\n", "circle.yaml").parent / name
    with pytest.raises(ConfigError, match=r"extends itself through .* To fix, break the circle"):
        load_config([path])


# Stage and recovery

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
    # Times of different units have no sum.
    other = write(TARGET + "max_duration: 30ba\nrecovery: {max_duration: 1ep}\n")
    load_config([other], ["stage=recover"])
    message = r"max_duration 30ba and recovery\.max_duration 1ep have different units.* To fix, g"
    with pytest.raises(ConfigError, match=message):
        load_config([other], ["method=random", "stage=recover"])


def test_recovery_keys_wait_for_their_stage(write):
    path = write(RECOVERY + "run_name: r\nresults_folder: res/${run_name}\n")
    config = load_config([path])
    assert (config.max_duration, config.optimizer.lr) == ("15000ba", 1e-4)
    overrides = ["model.d_model=32", "model.vocab_size=99", "model.revision=abc", "stage=recover"]
    # Heads that were made for the pruning are trained by it, and kept.
    heads = ["model.colbert_dim=8", "model.replace_heads=true"]
    config = load_config([path], [*overrides, *heads])
    assert config.model.colbert_dim is None and not config.model.replace_heads
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
        ("{optimizer: {lr: fast}}", "recovery.optimizer.lr must be a number, not 'fast'"),
        ("{optimizer: {lr: -1}}", "optimizer.lr -1.0 is not 0 or more"),
        ("{scheduler: {name: step}}", "scheduler.name 'step' is not one of"),
        ("{optimizr: {lr: 1}}", "unknown key 'recovery.optimizr'|unknown key 'optimizr'"),
        ("{method: random}", r"recovery\.method cannot differ from the pruning run's"),
    ],
)
def test_recovery_is_checked_before_pruning(section, message, write):
    with pytest.raises(ConfigError, match=message):
        load_config([write(TARGET + f"recovery: {section}\n")])


@pytest.mark.parametrize("stage", ["prune", "recover"])
def test_a_written_configuration_can_be_run_again(stage, write):
    text = RECOVERY + "data: {train: [{name: a, kind: sts, path: b}]}\nloggers: {wandb: {}}\n"
    config = load_config([write(text)], [f"stage={stage}", "run_name=ü"])
    written = load.to_yaml(config)
    assert yaml.safe_load(written) == asdict(config)
    if stage == "prune":
        assert load_config([write(written, "again.yaml")]) == config


DATA = "${oc.env:BGE_PRUNING_DATA}"


def test_the_folder_of_the_data_is_recorded_by_its_name(tmp_path, monkeypatch):
    """Data may move before a run resumes; what is no source of data is written out."""
    path = tmp_path / "run.yaml"
    path.write_text(f'data:\n  train:\n    - name: a\n      path: "{DATA}/{{language}}.txt"\n')
    message = (
        rf"^{path}:4: data\.train\.path: '{re.escape(DATA)}/{{language}}\.txt' needs the "
        r"environment variable BGE_PRUNING_DATA, which is not set\. To fix, set it to the folder of"
    )
    monkeypatch.delenv("BGE_PRUNING_DATA", raising=False)
    with pytest.raises(ConfigError, match=message):
        load_config([path])
    train = f"data.train=[{{name: a, kind: sentences, path: '{DATA}/a.txt'}}]"
    for folder in ("data", "/elsewhere/data"):
        monkeypatch.setenv("BGE_PRUNING_DATA", folder)
        config = load_config(
            [path], [train, f"data.processed_folder={DATA}/p", "recovery={seed: 4}"]
        )
        (source,) = config.data.train
        assert (source.path, source.place) == (f"{DATA}/a.txt", f"{folder}/a.txt")
        assert config.data.processed_folder == f"{folder}/p"
        (tmp_path / "again.yaml").write_text(load.to_yaml(config))
        again = load_config([tmp_path / "again.yaml"], ["stage=recover"])
        assert (again.data.train, again.seed) == ([source], 4)
