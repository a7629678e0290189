"""The layout that CONTRIBUTING.md describes: small rooms, each with one subject and one name."""

import ast
import importlib.util
from collections import Counter
from itertools import chain
from pathlib import Path
from statistics import median

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bge_pruning"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = (
    "algorithms callbacks config datasets evaluation export model_io models reports selection "
    "training utils workflows"
).split()
LAYERS = [
    "cli : workflows",
    "train : training",
    "callbacks | algorithms",
    "export",
    "evaluation | selection",
    "model_io",
    "models | datasets | reports",
    "config | utils",
]
PUBLISHED = """
    train
    models.composer_bge_m3 models.l0_module_embedding models.bge_m3_backbone
    models.embedding_heads models.model_registry
    datasets.sts_dataloader datasets.mteb_dataloader datasets.mixed_dataloader
    datasets.contrastive_dataset
    callbacks.embedding_callback callbacks.evaluation_callback callbacks.pruning_callback
    utils.embedding_metrics utils.model_analysis utils.visualization
""".split()
SCRIPTS = """
    train_pruning extract_pruned_model evaluate_model run_pipeline export_family choose_shape
    compare_runs write_report benchmark_efficiency benchmark_training run_quality_study
    check_index_compatibility quickstart prepare_minilm prepare_model train_heads
""".split()


def count_lines(paths: list[Path]) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in paths)


def contracts() -> dict[str, dict]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {entry["id"]: entry for entry in settings["tool"]["importlinter"]["contracts"]}


def test_the_package_has_thirteen_folders_and_none_below_them():
    found = {path.parent.relative_to(PACKAGE).as_posix() for path in MODULES}
    assert found == {".", *FOLDERS}
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "cli.py", "train.py"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_few_modules(folder):
    names = [path.name for path in (PACKAGE / folder).glob("*.py") if path.name != "__init__.py"]
    assert 0 < len(names) <= (10 if folder == "utils" else 15), sorted(names)


def test_no_module_name_is_used_twice():
    counts = Counter(path.stem for path in MODULES if path.stem != "__init__")
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("folder", [".", *FOLDERS])
def test_a_folder_says_in_one_sentence_what_it_holds(folder):
    tree = ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8"))
    (statement,) = tree.body
    said = ast.get_docstring(tree)
    assert isinstance(statement, ast.Expr) and said.count(".") == 1
    assert said.endswith(".") and "\n" not in said


def test_no_file_is_long():
    paths = [*MODULES, *(ROOT / "scripts").glob("*.py")]
    assert {p.name: n for p in paths if (n := count_lines([p])) > 400} == {}


def test_functions_are_short():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in MODULES]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in chain(*map(ast.walk, trees)) if isinstance(node, kinds)]
    lengths = {node: node.end_lineno - node.lineno + 1 for node in found}
    assert median(lengths.values()) <= 15
    assert [node.name for node, length in lengths.items() if length > 80] == []


@pytest.mark.parametrize(
    ("folder", "files", "most"),
    [("bge_pruning", "*", 33_700), ("tests", "*.py", 36_500)],
    ids=["package", "tests"],
)
def test_the_whole_is_small(folder, files, most):
    """Templates of the package count as its code does."""
    paths = [path for path in (ROOT / folder).rglob(files) if path.is_file()]
    assert count_lines([path for path in paths if "__pycache__" not in path.parts]) <= most


def test_scripts_are_few_and_keep_their_names():
    found = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert len(found) <= 16  # one is the old name of another
    assert set(SCRIPTS) <= found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_modules_are_where_they_were(name):
    assert importlib.util.find_spec(f"bge_pruning.{name}") is not None


def test_the_import_contracts():
    found = contracts()
    assert found["layers"]["layers"] == LAYERS
    assert found["layers"]["containers"] == ["bge_pruning"]
    assert "ignore_imports" not in found["layers"]
    omegaconf, matplotlib, composer = (
        {
            line.split(" -> ")[0].removeprefix("bge_pruning.")
            for line in found[name]["ignore_imports"]
        }
        for name in ("omegaconf", "matplotlib", "composer")
    )
    assert omegaconf == {"config.load"}
    assert matplotlib == {"reports.**", "utils.visualization"}
    folders = ("workflows", "training", "callbacks", "algorithms")
    modules = ("train", "models.composer_bge_m3", "models.model_registry", "utils.clock")
    assert composer == {f"{name}.**" for name in folders} | set(modules)
