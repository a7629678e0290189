"""A wheel, installed where there is no clone, is enough to work with."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# What a build reads; a build folder left in the clone must not be taken for sources.
SOURCES = ("bge_pruning", "configs", "setup.py", "pyproject.toml", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    words = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "."]
    subprocess.run([*PIP, *words], cwd=folder, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def call(wheel, tmp_path_factory):
    """A function from words to exit code, output and errors of the command, far from the clone."""
    site, place = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("place")
    install = [*PIP, "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True)

    def call(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, site / "bin" / "bge-pruning", *words],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not list(place.iterdir())
        lines = done.stderr.splitlines(keepends=True)
        said = [line for line in lines if not line.endswith(" loading libraries\n")]
        return done.returncode, done.stdout, "".join(said)

    return call


def test_the_wheel_holds_every_configuration_head_and_template(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    configs = {f"bge_pruning/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/*/*.yaml")}
    configs |= {f"bge_pruning/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/*/heads/*")}
    templates = {str(path.relative_to(ROOT)) for path in ROOT.glob("bge_pruning/*/templates/*")}
    assert configs | templates == {name for name in names if Path(name).suffix != ".py"} - {
        name for name in names if ".dist-info/" in name
    }


def test_help_is_quick(call):
    started = time.perf_counter()
    code, out, err = call("--help")
    assert (code, err) == (0, "") and "\n  prune  " in out
    assert time.perf_counter() - started < 2.0  # 0.1 s when the machine is idle


def test_a_shipped_configuration_is_planned(call):
    code, out, err = call("prune", "bge_m3/target_50pct", "dry_run=true")
    assert (code, err.count("\n")) == (1, 1)  # the data do not come with a wheel
    assert err.startswith(
        "error: data/sentences/newstest2019-*.txt.gz: fits no file. To fix, check"
    )
    assert "target       18 layers, hidden 1024, 16 heads, intermediate 2048" in out


def test_what_is_not_there_is_one_line(call):
    code, out, err = call("prune", "bge_m3/target_55pct", "dry_run=true")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: bge_m3/target_55pct: no such file. To fix, check the path, or ")
    assert "did you mean " in err and " minilm/quickstart, " in err
    code, out, err = call("quickstart")
    assert (code, out) == (1, "")
    assert err.endswith(" To fix, clone the repository and run it there.\n")
