"""The README and the pages that it links: commands, links, names, limits and numbers."""

import functools
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bge_pruning.cli import COMMANDS, main
from bge_pruning.config.load import load_config
from bge_pruning.config.shipped import find_config, split_arguments
from bge_pruning.models.encoder_shape import count_parameters
from bge_pruning.reports.efficiency_table import render_efficiency, render_training
from bge_pruning.training.plan import build_plan
from bge_pruning.utils import guard

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
for folder in ("docs", "data", "experiments"):
    FILES += sorted((ROOT / folder).glob("*.md")) + sorted((ROOT / folder).glob("*/README.md"))
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in FILES
    if path.name != "notes.md"
}
README = PAGES["README.md"]
ALL = "\n".join(PAGES.values())
# Scripts that made a number and are gone; the pages name the commit that contains them.
GONE, LAST = "data evaluation extraction int8".split(), "5e8902a"
TRAINING = "prune pipeline family shape".split()
SCRIPTS = {command.script: name for name, command in COMMANDS.items()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
FILE = re.compile(r"/|\.(json|md)$")
# Files that a reader has.
OWN = re.compile(r"(my|evaluation\.json)\b.*")


def blocks(text: str, language: str) -> list[str]:
    """What stands between fences of a language."""
    return [body for found, body in FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    """The text without any blocks."""
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """Inline code."""
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose(text))]


def commands_of(text: str) -> list[str]:
    """Lines of bash, with continued lines joined and variables filled in; and inline commands."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    variables = dict(re.findall(r'^([A-Z]+)="(.*)"$', "\n".join(lines), flags=re.MULTILINE))
    commands = [line for line in lines if line.strip() and not re.match("#|[A-Z]+=", line)]
    commands += [span for span in spans(text) if re.match(r"(python|bge-pruning|make) \S", span)]
    for name, value in variables.items():
        commands = [command.replace(f"${name}", value) for command in commands]
    return commands


ALL_COMMANDS = sorted({command for text in PAGES.values() for command in commands_of(text)})


def subcommand(words: list[str]) -> tuple[str, list[str]] | None:
    """The subcommand of ``bge-pruning`` that a command calls, and its arguments."""
    if words[0] == "bge-pruning":
        return words[1], words[2:]
    if words[0] == "composer":
        start = words.index("bge_pruning.train")
        assert words[start - 1] == "-m"
        return "prune", words[start + 1 :]
    if words[:3] == ["python", "-m", "bge_pruning.train"]:
        return "prune", words[3:]
    if words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file()
        return SCRIPTS[Path(words[1]).stem], words[2:]
    return None


@pytest.fixture
def parse_only(monkeypatch):
    """Commands end when their arguments are accepted."""
    for command in COMMANDS.values():
        importlib.import_module(command.target.partition(":")[0])
    run = guard.run_command
    for module in list(sys.modules.values()):
        if getattr(module, "run_command", None) is run:
            monkeypatch.setattr(module, "run_command", lambda *_, **__: 0)


def test_commands_are_found():
    called = [subcommand(shlex.split(command, comments=True)) for command in ALL_COMMANDS]
    assert {found[0] for found in called if found} == set(COMMANDS)


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_commands_are_accepted(command, parse_only, tmp_path):
    """By the program that they call; the configurations that they name load, and files exist."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        (target,) = [word for word in words[1:] if not re.match("[A-Z_]+=", word)]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    elif (found := subcommand(words)) is None:
        assert words[0] in ("pip", ".") or words[1:3] in (["-m", "pytest"], ["-m", "venv"])
    else:
        name, arguments = found
        assert not arguments or main([name, *arguments]) == 0
        if name in TRAINING:
            named = itertools.takewhile(lambda word: word[:2] != "--", arguments)
            paths, overrides = split_arguments([own_file(word, tmp_path) for word in named])
            load_config(paths, overrides)
    ends = (".py", ".yaml", ".csv", ".jsonl", ".txt")
    files = [word for word in words if word.endswith(ends) and not OWN.fullmatch(word)]
    assert [file for file in files if not (ROOT / file).is_file()] == []


def own_file(word: str, folder: Path) -> str:
    """The README's configuration in place of the file that its commands call so."""
    if word != "my.yaml":
        return word
    (folder / word).write_text(blocks(README, "yaml")[0], encoding="utf-8")
    return str(folder / word)


def test_composer_accepts_its_options():
    from composer.cli.launcher import _get_parser

    launches = [c for c in ALL_COMMANDS if c.startswith("composer ")]
    assert len(launches) > 4
    for command in launches:
        args = _get_parser().parse_args(shlex.split(command, comments=True)[1:])
        assert args.module_mode and args.training_script == "bge_pruning.train"


def test_options_that_are_named_exist(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    named = {option for span in spans(ALL) for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
    # Of pip, of a removed benchmark, and of a server.
    others = {"--require-hashes", "--large", "--rounds", "--model-id", "--runner"}
    assert sorted(named - known - others) == []


def test_keys_that_are_named_exist():
    config = load_config([find_config("bge_m3/base")])
    sections = "model data loss teacher evaluation optimizer parallelism loggers export baseline"
    dotted = rf"(?:recovery\.)?((?:{'|'.join(sections.split())})\.[a-z_0-9.]+)"
    keys = {m[1] for span in spans(ALL) if (m := re.match(dotted, span)) and not FILE.search(span)}
    assert len(keys) > 15
    for key in sorted(keys):
        functools.reduce(getattr, key.split("."), config)


@pytest.mark.parametrize(
    "override",
    sorted({s for s in spans(ALL) if re.fullmatch(r"[a-z][a-z_0-9.]*=[\w.]+", s)} - {"key=value"}),
)
def test_overrides_that_are_named_are_accepted(override):
    needed = ["parallelism.fsdp=true"] * override.startswith("parallelism.state_dict")
    load_config([find_config("minilm/quickstart")], [override, *needed])


def test_files_that_are_named_exist():
    names = set(re.findall(r"\b((?:scripts|tests|configs)/[\w/]+\.\w+)", ALL))
    gone = {f"scripts/benchmark_{name}.py" for name in GONE}
    assert gone <= names
    assert [name for name in names - gone if not (ROOT / name).exists()] == []
    for page, text in PAGES.items():
        assert LAST in text or not any(name in text for name in gone), page


def test_modules_that_are_named_exist():
    package = ROOT / "bge_pruning"
    folders = [path.parent.name for path in package.glob("*/__init__.py")]
    names = {s for s in spans(ALL) if re.fullmatch(rf"(?:{'|'.join(folders)})/\w+", s)}
    names = {name for name in names if not name.startswith("datasets/")}
    assert len(names) > 15
    assert [name for name in sorted(names) if not (package / f"{name}.py").is_file()] == []
    for text in (README, PAGES["CONTRIBUTING.md"], PAGES["docs/architecture.md"]):
        assert [name for name in folders if not re.search(rf"\b{name}\b", text)] == []


def links_of(page: str) -> list[tuple[Path, str]]:
    """Files and anchors that a page links."""
    found = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", prose(PAGES[page]))
    here = ROOT / page
    return [((here.parent / target).resolve() if target else here, name) for target, name in found]


def anchors_of(path: Path) -> list[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_lines_are_wrapped(page):
    """But for tables, and for what programs print."""
    for path, anchor in links_of(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors_of(path), f"{path}#{anchor}"
    text = FENCE.sub(lambda block: block[0] if block[1] else "", PAGES[page])
    assert [line for line in text.splitlines() if len(line) > 100 and line[0] != "|"] == []


def test_all_pages_are_reached():
    direct = {path for path, _ in links_of("README.md")}
    docs = {path for path in FILES if path.parent == ROOT / "docs"}
    assert docs and docs | {ROOT / "CONTRIBUTING.md"} <= direct
    for page in docs:
        others = {path for path, _ in links_of(page.relative_to(ROOT).as_posix())} & docs
        assert others - {page}, page


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 12 * 1024
    assert len(re.findall(r"^\|[ :|-]+\|$", README, re.MULTILINE)) in (1, 2)
    assert [line for line in README.splitlines() if len(line) > 100] == []


def table_after(text: str, start: str) -> list[list[str]]:
    """Cells of the table whose heading begins so."""
    start = text.index(start)
    lines = text[start : text.index("\n\n", start)].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


TARGETS = {
    cells[0].split("`")[1]: cells[1:]
    for cells in table_after(PAGES["docs/configuration.md"], "| file in `configs/bge_m3/` |")
}


def test_numbers_of_the_table_are_the_computed_ones():
    files = {path.stem: path for path in (ROOT / "configs" / "bge_m3").glob("*.yaml")}
    assert TARGETS.keys() == files.keys()
    sizes = "num_hidden_layers hidden_size num_attention_heads intermediate_size".split()
    for name, path in files.items():
        plan = build_plan(load_config([path]))
        target, source = count_parameters(plan.target), count_parameters(plan.source)
        assert TARGETS[name] == [
            ", ".join(str(getattr(plan.target, size)) for size in sizes),
            f"{target.encoder / 1e6:.1f}M",
            f"{target.encoder / source.encoder:.1%}",
            f"{target.total / 1e6:.0f}M",
        ]
    plan = build_plan(load_config([ROOT / "configs" / "minilm" / "quickstart.yaml"]))
    for shape in (plan.source, plan.target):
        for text in (README, PAGES["docs/results.md"]):
            assert f"{count_parameters(shape).encoder:,}" in text


def study_rows(scores: list[str], seeds: bool) -> list[list[str]]:
    """The study of methods, as the pages show it: groups from best to worst, then the floor."""
    path = ROOT / "experiments" / "results" / "quality" / "summary.json"
    summary, rows = json.loads(path.read_text(encoding="utf-8")), []
    for group in sorted(summary["groups"], key=lambda group: -group["kept"]["mean"]["mean"]):
        kept = [f"{100 * group['kept'][name]['mean']:.1f}" for name in scores]
        kept[0] += f" ± {100 * group['kept']['mean']['half_interval']:.1f}"
        size = group["size"].replace("pct", " %"), group["method"]
        count = [str(len(group["seeds"]))] if seeds else []
        rows.append([*size, f"{100 * group['encoder_share']:.1f} %", *count, *kept])
    kept = [f"{100 * summary['floor'][name]:.1f}" for name in scores]
    return [*rows, ["", "floor", "", *[""] * seeds, *kept]]


def methods_as_names(rows: list[list[str]]) -> list[list[str]]:
    """Rows of a page's table with the study's names of methods."""
    for cells in rows:
        every = "-every-nth" if "every n-th" in cells[1] else ""
        cells[1] = re.sub(r".*`(\w+)`.*", r"\1", cells[1]).partition(":")[0] + every
    return rows


def test_results_are_what_the_study_found():
    scores = ["mean", "stsb-en-test, dense"]
    scores += [f"scifact, {mode}" for mode in ("dense", "sparse", "colbert")]
    scores += ["qed-nq-en, dense"]
    found = methods_as_names(table_after(PAGES["docs/results.md"], "| target | method |"))
    assert sorted(found) == sorted(study_rows(scores, seeds=True))


def test_the_readme_has_gates_and_the_best_baseline_of_each_size():
    scores = ["mean", "stsb-en-test, dense", "scifact, dense", "qed-nq-en, dense"]
    rows = study_rows(scores, seeds=False)
    best = {row[0]: row for row in reversed(rows) if row[1] != "l0"}
    expected = [row for row in rows if row[1] == "l0"] + list(best.values())
    found = methods_as_names(table_after(README, "| target | method |"))
    assert sorted(found) == sorted(expected)


def test_tables_of_speed_are_what_was_measured():
    page = PAGES["docs/speed.md"]
    folder = ROOT / "experiments" / "results" / "performance"
    files = sorted(folder.glob("*.json"))
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        if path.name.startswith("speed-"):
            for row in table_after(render_efficiency(result) + "\n\n", "| runtime |"):
                row[1] = f"{row[1]} x {row[2].partition(' ')[0]}"
                assert " | ".join(row[:2] + row[3:5] + row[8:]) in page
        else:
            for row in table_after(render_training(result) + "\n\n", "| batches | training |"):
                assert " | ".join(row[:3] + row[4:]) in page
    assert len(files) == 7


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "yaml")])
def test_configurations_load(page, tmp_path):
    for yaml in blocks(PAGES[page], "yaml"):
        path = tmp_path / "page.yaml"
        path.write_text(yaml.replace("    - ...", "    #"), encoding="utf-8")
        load_config([path])


RUN_SNIPPETS = """\
import sys
from pathlib import Path

import numpy as np

for path in sys.argv[1:]:
    found = {}
    exec(Path(path).read_text(), found)
    arrays = {"dense": np.asarray(found["dense"])}
    if "vectors" in found:
        arrays |= {f"vectors{i}": np.asarray(row) for i, row in enumerate(found["vectors"])}
    np.savez(path + ".npz", **arrays)
assert not {"bge_pruning", "composer"} & set(sys.modules)
"""


@pytest.fixture
def snippets(train_tiny, tmp_path):
    """What the programs of the README and of export.md compute, in a process without the package.

    By tool, from the folder that the README's command writes: of a tiny run of mean pooling.
    """
    run = train_tiny(tmp_path / "train", "max_duration=1ba", "model.pooling=mean")
    (command,) = [c for c in commands_of(README) if "extract" in c and "my_model" in c]
    name, (_, folder, *options) = subcommand(shlex.split(command))
    assert (name, folder) == ("extract", "my_model")
    assert main([name, str(run), str(tmp_path / folder), *options]) == 0
    paths = []
    for block in blocks(README, "python") + blocks(PAGES["docs/export.md"], "python"):
        paths.append(tmp_path / f"snippet{len(paths)}.py")
        paths[-1].write_text(block.replace("colbert_dim=384", "colbert_dim=32"))
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    runner = [sys.executable, "-c", RUN_SNIPPETS, *map(str, paths)]
    subprocess.run(runner, check=True, cwd=tmp_path, env=elsewhere)
    tools = "sentence-transformers", "FlagEmbedding", "transformers", "onnxruntime"
    return dict(zip(tools, (np.load(f"{path}.npz") for path in paths), strict=True))


def test_snippets_compute_what_the_package_does(snippets, tmp_path):
    from bge_pruning.evaluation.text_encoder import TextEncoder
    from bge_pruning.model_io.pretrained import load_base_model

    base = load_base_model(str(tmp_path / "my_model"))
    texts = re.findall(r'encode\(\["(.*?)", "(.*?)"\]\)', README)[0]
    projected = TextEncoder(base).encode(texts).dense_vecs
    plain = TextEncoder(replace(base, projection=None)).encode(texts).dense_vecs
    for tool, found in snippets.items():
        expected = plain if tool in ("transformers", "FlagEmbedding") else projected
        np.testing.assert_allclose(found["dense"], expected, atol=1e-5)
    flag, onnx = snippets["FlagEmbedding"], snippets["onnxruntime"]
    for row in ("vectors0", "vectors1"):
        np.testing.assert_allclose(flag[row], onnx[row][: len(flag[row])], atol=1e-5)
        assert flag[row].shape[1] == 32
