"""Values that are refused whatever the model and the command are."""

import pytest
import yaml

from bge_pruning.config.checks import check_schedule
from bge_pruning.config.load import ConfigError, load_config

L0 = "model.l0_module."
TIMES = "max_duration eval_interval save_interval log_interval scheduler.t_warmup".split()
EXACTLY = r"one of target_model, target_parameters, target_density, target_speedup, not "
BEYOND = {
    f"{L0}lagrangian_warmup_steps": ("61ba", "60ba", "1dur", "1.5dur"),
    "scheduler.t_warmup": ("61ba", "1.1dur"),
    "data.adapt_weights_interval": ("60ba", "1dur"),
}
NAME = r"run_name '.*' is not the name of a folder, of 1 to 200 bytes and without '/'\. To fix"
DENSITY = r"is not in \(0, 1\]: it is the share .* write e\.g\. 0\.6"
SPEEDUP = r"is not above 1: it says how many times .* e\.g\. 2"
FSDP = "parallelism.fsdp=true"
STREAM = "kind: sentences, path: hf://a/b, streaming: true"
PARALLEL = "kind: parallel, path: 'x-{language}.txt'"
SHARDED = "parallelism.state_dict=sharded"


@pytest.fixture
def target_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {l0_module: {target_model: {n_layers: 3}}}\n")
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # Valid for no key
        ("optimizer.lr=.nan", r"optimizer\.lr nan is not a finite number below 1e\+15\. To fix"),
        ("optimizer.lr=.inf", r"optimizer\.lr inf is not a finite number"),
        ("optimizer.betas=[.nan,0.9]", r"optimizer\.betas\[0\] nan is not a finite number"),
        (f"{L0}init_mean=-.inf", r"model\.l0_module\.init_mean -inf is not a finite"),
        (f"{L0}target_parameters={10**300}", r"target_parameters .* is not a finite"),
        (f"seed={10**400}", "seed of many digits is not a finite number|cannot be read"),
        (f"model.max_length={10**30}", r"model\.max_length of many digits is not a finite number"),
        (f"optimizer.lr={10**400}", r"optimizer\.lr must be a number, not 10{59}\. To fix"),
        ("run_name='a}'", r"run_name 'a}' holds a brace, which stands for .* To fix, write it wi"),
        ("run_folder='a{rank}'", r"run_folder 'a{rank}' holds a brace"),
        ("loggers.folder='{'", r"loggers\.folder '{' holds a brace"),
        ("optimizer.betas=[[1, 2], [3]]", r"an item of optimizer\.betas must be a number, not "),
        ("evaluation.modes=[[a]]", r"an item of evaluation\.modes must be a text, not "),
        ("data.train=[{name: a, kind: sts, path: b, columns: {a: [b]}}]", r"columns\.a must be"),
        ('model.base_model="a\\0b"', r"model\.base_model 'a\\x00b' holds a null byte"),
        # Out of range
        ("seed=4294967296", r"seed 4294967296 is not below 2\^32\. To fix, use e\.g\. 17"),
        ("seed=-1", "seed -1 is not 0 or more"),
        ("data.num_workers=1000", r"data\.num_workers 1000 is above 256 processes\. To fix, use a"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas \[0\.9\] are not two numbers in \[0, 1\)"),
        ("optimizer.betas=[0.9,1.5]", r"are not two numbers in \[0, 1\)\. To fix, write e\.g\."),
        ("global_train_batch_size=0", "global_train_batch_size 0 is not above 0"),
        ("eval_batch_size=0", "eval_batch_size 0 is not above 0"),
        ("device_train_microbatch_size=0", "device_train_microbatch_size 0 is not above 0"),
        ("checkpoints_to_keep=0", "checkpoints_to_keep 0 is not above 0"),
        ("dist_timeout=0", "dist_timeout 0.0 is not above 0"),
        ("model.max_length=0", "model.max_length 0 is not above 0"),
        ("evaluation.max_length=0", "evaluation.max_length 0 is not above 0"),
        ("loss.similarity_temperature=0", "loss.similarity_temperature 0.0 is not above 0"),
        ("baseline.calibration_texts=0", r"baseline\.calibration_texts 0 is not above 0"),
        ("optimizer.eps=0", "optimizer.eps 0.0 is not above 0"),
        ("optimizer.lr=-1", "optimizer.lr -1.0 is not 0 or more"),
        ("optimizer.lagrangian_lr=-1", "optimizer.lagrangian_lr -1.0 is not 0 or more"),
        ("loss.sts_regression=-1", "loss.sts_regression -1.0 is not 0 or more"),
        ("model.dropout=1.5", r"model.dropout 1.5 is not in \[0, 1\]"),
        ("scheduler.alpha_f=2", r"scheduler.alpha_f 2.0 is not in \[0, 1\]"),
        (f"{L0}start_sparsity=1.1", r"start_sparsity 1.1 is not in \[0, 1\]"),
        *((f"{L0}target_density={share}", DENSITY) for share in (0.0, -0.5, 1.5, 60)),
        *((f"{L0}target_speedup={factor}", SPEEDUP) for factor in (1.0, 0.5, -2)),
        (f"{L0}target_length=0", r"target_length .* is not above 0: .* write e\.g\. 512"),
        # None of the choices
        ("stage=train", "stage 'train' is not one of"),
        ("scheduler.name=step", "scheduler.name 'step' is not one of"),
        ("precision=fp8", "precision 'fp8' is not one of"),
        ("device=tpu", "device 'tpu' is not one of"),
        ("optimizer.non_finite=ignore", "optimizer.non_finite 'ignore' is not one of"),
        ("model.pooling=max", "model.pooling 'max' is not one of"),
        ("method=taylor", r"method 'taylor' is not one of .*'magnitude'.* To fix, choose one"),
        ("baseline.layer_choice=worst", r"layer_choice 'worst' is not one of \('best', 'every_nt"),
        ("parallelism.sharding=half", "parallelism.sharding 'half' is not one of"),
        ("parallelism.state_dict=none", "parallelism.state_dict 'none' is not one of"),
        ("data.train=[{name: a, kind: csv, path: b}]", "kind of data source 'a' 'csv'"),
        ("data.train=[{name: a, kind: sts}]", r"data.train\[0\].path: .*To fix, give the key a va"),
        # Times
        *((f"{key}=100 steps", f"{key} '100 steps'") for key in TIMES),
        (f"{L0}lagrangian_warmup_steps=100 steps", "lagrangian_warmup_steps '100 steps'"),
        ("max_duration=9999999999ba", r"max_duration '9999999999ba' is not a time"),
        ("max_duration=١ba", r"max_duration '١ba' is not a time"),
        # Several keys
        (f"{L0}target_model=null", rf"{EXACTLY}0 \(none\)"),
        (
            f"{L0}target_density=0.5 && {L0}target_speedup=2",
            rf"{EXACTLY}2 \(target_density, target_speedup\)\. To fix, give one of them",
        ),
        # Stages of the data
        *(
            (f"data.stages=[{stages}] && max_duration=60ba", message)
            for stages, message in (
                ("{weights: {a: 1}}", r"stages\[0\] needs steps or until, and not both. To fix"),
                ("{steps: 3, until: 1dur}", "needs steps or until, and not both"),
                ("{until: 2ep}", "data.stages.until '2ep' is not a time"),
                ("{steps: 0}", "data.stages.steps 0 is not above 0"),
                ("{steps: 40}, {until: 0.5dur}", r"\[1\] until 0.5dur ends with step 30, before"),
                ("{steps: 50}", r"end with step 50, the run with 60 \(max_duration 60ba\). To fix"),
                ("{steps: 50}, {until: 70ba}", "end with step 70, the run with 60"),
            )
        ),
        (
            "data.stages=[{steps: 60}] && max_duration=60ba && recovery={max_duration: 10ba}",
            r"with step 60, the run with 10 \(recovery.max_duration 10ba\).* recovery.data.stages",
        ),
        # Times that the run ends before
        *(
            (
                f"{key}={time} && max_duration=60ba",
                rf"{key} {time} is not over .* max_duration 60ba",
            )
            for key, times in BEYOND.items()
            for time in times
        ),
        ("max_duration=2ep && scheduler.t_warmup=3ep", r"t_warmup 3ep .* max_duration 2ep"),
        (
            "scheduler.t_warmup=20ba && recovery={max_duration: 10ba}",
            r"scheduler\.t_warmup 20ba is not over .* after recovery\.max_duration 10ba\. To fix",
        ),
        (SHARDED, "state_dict=sharded needs a sharded model"),
        (f"{FSDP} && {SHARDED} && evaluation.keep_best=a/b", "evaluation.keep_best writes one fi"),
        (f"{FSDP} && model.compile=true", "fsdp does not work with model.compile=true"),
        (f"{FSDP} && precision=amp_fp16", "fsdp does not work with precision=amp_fp16"),
        *((f"run_name={name}", NAME) for name in ("../x", "/etc/x", "a/b", "..", ".", "''", "' '")),
        (f"run_name={'x' * 201}", NAME),
    ],
)
def test_refused_values(overrides, message, target_yaml):
    with pytest.raises(ConfigError, match=message) as error:
        load_config([target_yaml], overrides.split(" && "))
    assert "To fix, " in str(error.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("score_range: [0, .inf]", r"score_range\[1\] of data source 'x' inf is not a finite num"),
        ("score_range: [5, 0]", r"score_range \[5.0, 0.0\] .* is not \[lowest, highest\]"),
        ("score_range: [5]", r"score_range \[5.0\] .* is not \[lowest, highest\]"),
        ("weight: .inf", r"weight of data source 'x' inf is not a finite number"),
        ("split: ../x", "split '../x' of data source 'x' is not the name of a split"),
        ("mining_margin: 2", "mining_margin of data source 'x' 2.0 is not in .0, 1."),
        ("replaced_tokens: 0.5", "replaced_tokens of data source 'x' is not for kind sts: "),
        ("passages: {}", "passages of data source 'x' is not for kind sts"),
        ("passages: {min_tokens: 0}", "passages.min_tokens of data source 'x' 0 is not above 0"),
        (
            "kind: sentences, passages: {max_tokens: 600}",
            "passages.max_tokens 600 of data source 'x' is not from min_tokens 64 to "
            "model.max_length 512",
        ),
        (
            "kind: sentences, passages: {long_share: 0.1}",
            "passages.long_max_tokens 8192 of data source 'x' is not from min_tokens 64 to",
        ),
        ("replaced_tokens: 2", "replaced_tokens of data source 'x' 2.0 is not in"),
        ("role: query", "role of data source 'x' is not for kind sts: its rows say what a text is"),
        (
            "kind: sentences, role: text",
            "role of data source 'x' 'text' is not one of .'query', 'pass",
        ),
        ("negatives: -1", "negatives of data source 'x' -1 is not 0 or more"),
        ("lines: ':-4'", "lines of data source 'x' is not for kind sts"),
        ("languages: [de, en]", "languages of data source 'x' is not for kind sts"),
        ("kind: sentences, lines: 400", "lines '400' of data source 'x' is not FIRST:LAST as Pyth"),
        ("kind: sentences, lines: {-400: }", "data.train.lines must be a text, not {-400: None}"),
        ("rows: 0", "rows of data source 'x' 0 is not above 0"),
        ("kind: beir, rows: 5", "rows of data source 'x' is not for kind beir with path 'a.csv'"),
        ("streaming: true", "streaming of data source 'x' is not for kind sts with path 'a.csv'"),
        ("path: hf://a/b, collection: {query: q}", "collection .* is not for kind sts"),
        (f"{STREAM}, split: 'train[:9]'", r"split 'train\[:9\]' of data source 'x' cuts a stream"),
        (f"{STREAM}, columns: {{text: 'a[0]'}}", r"columns of data source 'x' name 'a\[0\]'"),
        (
            "kind: contrastive, path: hf://a/b, collection: {queries: q}",
            "collection of data source 'x' names queries",
        ),
        ("path: hf://shitao/mldr", "path of data source 'x': this data set is read by a program"),
        (
            PARALLEL,
            r"languages \[\] of data source 'x' are not two or more different ones, or pairs",
        ),
        (
            f"{PARALLEL}, languages: [de]",
            r"languages \['de'\] .* are not two or more different ones",
        ),
        (f"{PARALLEL}, languages: [de, en, de]", "are not two or more different ones"),
        (f"{PARALLEL}, languages: [no, en]", "languages .* name no, which is false in YAML"),
        (f"{PARALLEL}, languages: [de, en], lines: '::2'", "lines '::2' of data source 'x' is not"),
        (
            "kind: parallel, languages: [de, en]",
            r"path 'a\.csv' of data source 'x' has no {language}\.",
        ),
    ],
)
def test_refused_settings_of_a_source(extra, message, target_yaml):
    given = {"name": "x", "kind": "sts", "path": "a.csv", **yaml.safe_load(f"{{{extra}}}")}
    source = f"data.train=[{yaml.safe_dump(given, default_flow_style=True, width=999).strip()}]"
    with pytest.raises(ConfigError, match=f"{message}.*To fix, "):
        load_config([target_yaml], [source])


def test_a_run_name_may_hold_any_letters(target_yaml):
    config = load_config([target_yaml], ["run_name=модель 🐈.v2"])
    assert config.run_folder == "experiments/checkpoints/модель 🐈.v2"


@pytest.mark.parametrize(
    "overrides",
    [
        "max_duration=60ba && eval_interval=100ba && save_interval=2ep && log_interval=61ba",
        f"max_duration=60ba && {L0}lagrangian_warmup_steps=59ba && scheduler.t_warmup=60ba",
        f"max_duration=60ba && {L0}lagrangian_warmup_steps=50ba && recovery={{max_duration: 9ba}}",
        f"max_duration=60ba && {L0}lagrangian_warmup_steps=60ba && method=random",
        "max_duration=60ba && scheduler.t_warmup=1ep",  # how long is known with the data
        "max_duration=20ba && scheduler.t_warmup=30ba && stage=recover && "
        "recovery={max_duration: 40ba}",
    ],
    ids=["at the end too", "in time", "no gates in a recovery", "no gates", "units", "one stage"],
)
def test_times_that_a_run_reaches_or_does_not_have(overrides, target_yaml):
    load_config([target_yaml], overrides.split(" && "))


def test_epochs_and_batches_are_compared_once_there_are_data(target_yaml):
    config = load_config([target_yaml], ["max_duration=60ba", "scheduler.t_warmup=1ep"])
    check_schedule(config, epoch=60)
    with pytest.raises(ConfigError, match=r"t_warmup 1ep is not over when the run ends, after max"):
        check_schedule(config, epoch=61)
    config = load_config([target_yaml], ["max_duration=2ep", f"{L0}lagrangian_warmup_steps=60ba"])
    check_schedule(config, epoch=31)
    with pytest.raises(ConfigError, match=r"lagrangian_warmup_steps 60ba is not over when .* 2ep"):
        check_schedule(config, epoch=30)
