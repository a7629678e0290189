"""What no file may do: run code, leave its folder, or show a secret."""

import ast
import logging
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "bge_pruning").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
# Modules and calls that run what a file holds, or leave a folder.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load"}
CALLS |= {"yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive", "np.fromfile"}
METHODS = {"extractall", "extract_all", "unpack_archive"}


def dotted(node: ast.AST) -> str:
    """A name such as ``torch.load``."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def arguments(call: ast.Call) -> dict[str, object]:
    return {k.arg: getattr(k.value, "value", k.value) for k in call.keywords if k.arg}


def find_unsafe(tree: ast.AST) -> list[str]:
    """Line and name of everything that is refused."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if MODULES & {name.partition(".")[0] for name in names}:
                found.append(f"{node.lineno}: imports {names}")
        if isinstance(node, ast.Call):
            name, given = dotted(node.func), arguments(node)
            unsafe = (
                name in CALLS
                or name.rpartition(".")[2] in METHODS
                or (name == "torch.load" and given.get("weights_only") is not True)
                or given.get("allow_pickle") is True
                or given.get("shell") is True
                or given.get("trust_remote_code", False) is not False
            )
            if unsafe:
                found.append(f"{node.lineno}: {name}")
    return found


def reads_by_allow_list(tree: ast.AST) -> bool:
    """Whether of pickle nothing is used but an unpickler that says itself what it finds."""
    used = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and dotted(n.value) == "pickle"
    }
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    readers = [c for c in classes if "pickle.Unpickler" in map(dotted, c.bases)]
    methods = [{f.name for f in c.body if isinstance(f, ast.FunctionDef)} for c in readers]
    restricted = all("find_class" in names for names in methods)
    return used <= {"Unpickler", "UnpicklingError"} and bool(readers) and restricted


def reads_members_alone(tree: ast.AST) -> bool:
    """Whether of an archive nothing but the content of its files is read: names are our own."""
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    used = {n.attr for n in attributes if dotted(n.value) == "tarfile"}
    return used <= {"open", "TarInfo", "TarError"} and "extract" not in {n.attr for n in attributes}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_a_file_holds(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = find_unsafe(tree)
    if reads_by_allow_list(tree):
        found = [line for line in found if "imports ['', 'pickle']" not in line]
    if reads_members_alone(tree):
        found = [line for line in found if "imports ['', 'tarfile']" not in line]
    assert not found


UNSAFE = """\
import pickle
from joblib import load
torch.load(path)
torch.load(path, weights_only=False)
np.load(path, allow_pickle=True)
yaml.load(text)
subprocess.run(words, shell=True)
AutoModel.from_pretrained(name, trust_remote_code=True)
load_dataset(name, trust_remote_code=flag)
archive.extractall(folder)
os.system(command)
eval(text)"""
SAFE = """\
torch.load(path, weights_only=True)
model.eval()
subprocess.run([name])
re.compile(x)"""
UNPICKLERS = [
    "pickle.load(file)",
    "pickle.Unpickler(file).load()\npickle.loads(text)",
    "class Reader(pickle.Unpickler):\n    pass",
]


def test_what_is_looked_for_is_found_and_nothing_else():
    assert [line for line in UNSAFE.splitlines() if not find_unsafe(ast.parse(line))] == []
    assert [line for line in SAFE.splitlines() if find_unsafe(ast.parse(line))] == []
    assert not any(reads_by_allow_list(ast.parse(f"import pickle\n{t}")) for t in UNPICKLERS)


SECRET = "hf_secretsecretsecret"


@pytest.fixture
def secrets(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)


def test_no_secret_in_errors_logs_and_records(secrets, tiny_yaml, tmp_path, capsys, caplog):
    """Of a run that fails, and of one that is recorded."""
    from bge_pruning.config.load import load_config, to_yaml
    from bge_pruning.train import main
    from bge_pruning.training.run_start import prepare_run_folder

    for words in (["seed=x"], ["model.base_model=no/such"], ["dry_run=true"]):
        with caplog.at_level(logging.DEBUG):
            main([str(tiny_yaml), *words])
    config = load_config([tiny_yaml])
    prepare_run_folder(config)
    output = capsys.readouterr()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert SECRET not in output.out + output.err + caplog.text + to_yaml(config)
    assert not any(SECRET.encode() in content for content in written)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:HF_TOKEN}",
        "${oc.env:HOME}",
        "${oc.env:BGE_PRUNING_DATA,${oc.env:HF_TOKEN}}",
        "${oc.env:BGE_PRUNING_DATA}${oc.env:HF_TOKEN}",
    ],
)
def test_a_configuration_cannot_read_the_environment(
    value, secrets, tiny_yaml, capsys, monkeypatch
):
    """It would be written into config.yaml, reports and W&B."""
    from bge_pruning.train import main

    monkeypatch.setenv("BGE_PRUNING_DATA", "here")
    assert main([str(tiny_yaml), f"run_name={value}", "dry_run=true"]) == 2
    assert "run_name: " in (err := capsys.readouterr().err)
    assert "cannot be read from a configuration. To fix, write the value itself" in err
    assert SECRET not in err
