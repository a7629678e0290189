"""Damaged configurations, data and models at every command line: it runs, or says what is wrong."""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bge_pruning.train import main as train_main
from tests.common.script_process import load_script

pytestmark = pytest.mark.reliability
# To look further by hand: a share of the examples, and other ones.
SHARE, SALT = float(os.environ.get("FUZZ_SHARE", "1")), os.environ.get("FUZZ_SALT", "")
UNFINISHED = re.compile(r"\.partial|\.tmp")


def _load(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # they import each other, and dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_load("fuzz_mutations")
runner, TARGETS = _load("fuzz_runner"), _load("fuzz_targets").TARGETS


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory, make_yaml, model_folder, sts_csv, contrastive_jsonl, collection
) -> Path:
    """A folder with one of everything that a command reads, all of it as it should be."""
    from bge_pruning.workflows import pipeline

    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(model_folder, root / "base")
    shutil.copytree(collection, root / "beir")
    shutil.copy(sts_csv, root / "pairs.csv")
    shutil.copy(contrastive_jsonl, root / "queries.jsonl")
    words = "the man woman dog cat child park plays reads eats rides guitar red book".split()
    pairs = [f"{a} {b}\n" for a in words for b in words]
    (root / "texts.txt").write_text("".join(pairs))
    os.chdir(root)
    text = make_yaml(root / "made").read_text()
    text = text.replace(str(model_folder), "base").replace(str(sts_csv), "pairs.csv")
    (root / "tiny.yaml").write_text(text.replace(f"{root}/made/", ""))
    times = "max_duration=2ba eval_interval=1ba save_interval=1ba".split()
    overrides = [*times, "export.keep_dimension=true"]
    plan = pipeline.EvaluationPlan(["pairs.csv"], ["beir"])
    pipeline.run_pipeline(["tiny.yaml"], overrides, plan)
    results = root / "results" / "tiny"
    shutil.move(results, root / "half")
    shutil.move(root / "runs" / "tiny", root / "run")
    main = load_script("check_index_compatibility").main
    words = "base half/model --texts texts.txt --queries texts.txt --output index.json"
    done = runner.call(main, words.split())
    assert done.code == 0, done
    for name in ("runs", "results", "made", "logs"):
        shutil.rmtree(root / name, ignore_errors=True)
    return root


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """Makes the folder of one example, with copies of what it names, and works in it."""

    def make(*names: str) -> Path:
        os.chdir(tmp_path)
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in names:
            source = whole / name
            if source.is_dir():
                shutil.copytree(source, name)
            else:
                Path(name).parent.mkdir(exist_ok=True)
                shutil.copy(source, name)
        return tmp_path

    monkeypatch.chdir(tmp_path)
    return make


def damage_of(before: dict[str, str], after: dict[str, str]) -> str:
    """What a command that failed has changed, or left half-written."""
    lost = [path for path, digest in before.items() if after.get(path) != digest]
    new = [path for path in after if path not in before]
    left = [p for p in new if p.split("/")[0] in ("out", "out.json") or UNFINISHED.search(p)]
    return f"lost {lost[:3]}" if lost else f"left {left[:3]}" if left else ""


@pytest.mark.parametrize("name", TARGETS)
def test_bad_input_is_one_clear_error(name, place, summary):
    script, prepare, count = TARGETS[name]
    main = train_main if script == "train" else load_script(script).main
    defects: dict[str, str] = {}

    @settings(
        max_examples=int(count * SHARE),
        derandomize=True,  # the same examples every time
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**64))
    def try_one(seed: int) -> None:
        arguments, done = prepare(place, Random(f"{SALT}{name}{seed}"))
        before = runner.fingerprint(Path.cwd())
        outcome = runner.call(main, arguments)
        defect = outcome.defect()
        if not defect and outcome.code:
            defect = damage_of(before, runner.fingerprint(Path.cwd()))
        if defect:
            # One example of each defect is enough to find it.
            kind = re.sub(r"'[^']*'|[\d.]+", "*", defect)[:90]
            defects.setdefault(kind, f"{' '.join(defect.split())} [{done} seed={seed}]")
        summary["inputs tried"] += 1
        code = f"inputs that ended with {outcome.code}"
        summary[code] += 1

    try_one()
    assert not defects, "\n".join(["", *sorted(defects.values())])
