"""Values that no key can mean, whatever the key."""

import pytest

from bge_pruning.config.load import ConfigError, load_config


@pytest.fixture
def empty(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=.nan", r"optimizer\.lr nan is not a finite number below 1e\+15\. To fix"),
        ("optimizer.lr=.inf", r"optimizer\.lr inf is not a finite number"),
        ("optimizer.betas=[.nan,0.9]", r"optimizer\.betas\[0\] nan is not a finite number"),
        ("model.l0_module.init_mean=-.inf", r"model\.l0_module\.init_mean -inf is not a finite"),
        (f"model.l0_module.target_parameters={10**300}", r"target_parameters .* is not a finite"),
        (f"seed={10**400}", "seed of many digits is not a finite number|cannot be read"),
        (f"model.max_length={10**30}", r"model\.max_length of many digits is not a finite number"),
        (
            "run_name='a}'",
            r"run_name 'a}' holds a brace, which stands for .* To fix, write it with",
        ),
        ("run_folder='a{rank}'", r"run_folder 'a{rank}' holds a brace"),
        ("loggers.folder='{'", r"loggers\.folder '{' holds a brace"),
        (
            "optimizer.betas=[[1, 2], [3]]",
            r"betas .* does not hold numbers alone\. To fix, write n",
        ),
        ("evaluation.modes=[[a]]", r"evaluation\.modes .* does not hold texts alone\. To fix"),
        ("data.train=[{name: a, kind: sts, path: b, columns: {a: [b]}}]", "does not hold texts"),
        (
            f"optimizer.lr={10**400}",
            r"too large to convert to float\. To fix, write a smaller number",
        ),
        ("seed=4294967296", r"seed 4294967296 is not below 2\^32\. To fix, use e\.g\. 17"),
        ("data.num_workers=1000", r"data\.num_workers 1000 is above 256 processes\. To fix, use a"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas \[0\.9\] are not two numbers in \[0, 1\)"),
        ("optimizer.betas=[0.9,1.5]", r"are not two numbers in \[0, 1\)\. To fix, write e\.g\."),
        ("max_duration=9999999999ba", r"max_duration '9999999999ba' is not a time"),
        ("max_duration=١ba", r"max_duration '١ba' is not a time"),
        ('model.base_model="a\\0b"', r"model\.base_model 'a\\x00b' holds a null byte"),
    ],
)
def test_odd_values(override, message, empty):
    with pytest.raises(ConfigError, match=message):
        load_config([empty], [override])


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".", "''", "' '", "x" * 201])
def test_a_run_name_stays_in_its_folders(name, empty):
    message = (
        r"run_name '.*' is not the name of a folder, of 1 to 200 bytes and without '/'\. To fix"
    )
    with pytest.raises(ConfigError, match=message):
        load_config([empty], [f"run_name={name}"])


def test_a_run_name_may_hold_any_letters(empty):
    config = load_config([empty], ["run_name=модель 🐈.v2"])
    assert config.run_folder == "experiments/checkpoints/модель 🐈.v2"
