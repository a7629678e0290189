"""What the README says is there and is true."""

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

from bge_pruning.config.load import load_config
from bge_pruning.models.encoder_shape import count_parameters
from bge_pruning.training.plan import build_plan

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
ROWS = re.findall(r"^\| `(\w+)`.*$", TEXT, flags=re.MULTILINE)


def row(name: str) -> list[str]:
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{name}`")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_commands_are_here(command):
    words = shlex.split(command, comments=True)
    files = [word for word in words if word.endswith((".py", ".yaml", ".csv", ".txt"))]
    missing = [file for file in files if not (ROOT / file).is_file()]
    assert not missing


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_are_here(command):
    target = shlex.split(command, comments=True)[1]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_preset_is_in_the_table():
    assert sorted(ROWS) == sorted(p.stem for p in (ROOT / "configs" / "bge_m3").glob("*.yaml"))


@pytest.mark.parametrize("name", ROWS)
def test_numbers_of_the_table_are_the_computed_ones(name):
    plan = build_plan(load_config([ROOT / "configs" / "bge_m3" / f"{name}.yaml"]))
    target, source = count_parameters(plan.target), count_parameters(plan.source)
    shape = plan.target
    sizes = (
        shape.num_hidden_layers,
        shape.hidden_size,
        shape.num_attention_heads,
        shape.intermediate_size,
    )
    assert row(name)[1:] == [
        ", ".join(map(str, sizes)),
        f"{target.encoder / 1e6:.1f}M",
        f"{target.encoder / source.encoder:.1%}",
        f"{target.total / 1e6:.0f}M",
    ]


def test_what_is_kept_is_what_the_study_found():
    path = ROOT / "experiments" / "results" / "quality" / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    scores = ["mean", *(f"scifact, {mode}" for mode in ("dense", "sparse", "colbert"))]
    scores[1:1] = ["stsb-en-test, dense"]
    scores.append("qed-nq-en, dense")
    expected = []
    for group in summary["groups"]:
        seeds, share = str(len(group["seeds"])), f"{100 * group['encoder_share']:.1f} %"
        kept = [f"{100 * group['kept'][name]['mean']:.1f}" for name in scores]
        if (half := group["kept"]["mean"]["half_interval"]) is not None:
            kept[0] += f" ± {100 * half:.1f}"
        expected.append([group["size"].replace("pct", " %"), group["method"], share, seeds, *kept])
    kept = [f"{100 * summary['floor'][name]:.1f}" for name in scores]
    expected.append(["", "floor", "", "", *kept])
    start = TEXT.index("| target | method |")
    lines = TEXT[start : TEXT.index("\n\n", start)].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for cells in rows:
        every = "-every-nth" if "every n-th" in cells[1] else ""
        cells[1] = re.sub(r".*`(\w+)`.*", r"\1", cells[1]) + every
    assert sorted(rows) == sorted(expected)


def test_target_of_the_quickstart_is_the_computed_one():
    plan = build_plan(load_config([ROOT / "configs" / "minilm" / "quickstart.yaml"]))
    assert f"{count_parameters(plan.source).encoder:,}" in TEXT
    assert f"{count_parameters(plan.target).encoder:,}" in TEXT


@pytest.mark.parametrize("yaml", re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
def test_configurations_load(yaml, tmp_path):
    path = tmp_path / "readme.yaml"
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


def test_snippets_run_on_the_model_of_the_extract_command(train_tiny, tmp_path):
    """The README's command, then its programs in a fresh process, on a tiny run of mean pooling."""
    from bge_pruning.evaluation.text_encoder import TextEncoder
    from bge_pruning.model_io.pretrained import load_base_model

    run = train_tiny(tmp_path / "train", "max_duration=1ba", "model.pooling=mean")
    (command,) = [c for c in COMMANDS if "extract_pruned_model.py" in c and "my_model" in c]
    words = shlex.split(command)[4:]
    script = [sys.executable, str(ROOT / "scripts" / "extract_pruned_model.py")]
    subprocess.run([*script, run, tmp_path / "my_model", *words], check=True, cwd=tmp_path)
    snippets = []
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        snippets.append(tmp_path / f"snippet{len(snippets)}.py")
        snippets[-1].write_text(block.replace("colbert_dim=384", "colbert_dim=32"))
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    runner = [sys.executable, "-c", RUN_SNIPPETS, *map(str, snippets)]
    subprocess.run(runner, check=True, cwd=tmp_path, env=elsewhere)

    base = load_base_model(str(tmp_path / "my_model"))
    texts = re.findall(r'encode\(\["(.*?)", "(.*?)"\]\)', TEXT)[0]
    projected = TextEncoder(base).encode(texts).dense_vecs
    plain = TextEncoder(replace(base, projection=None)).encode(texts).dense_vecs
    sentence, transformers, flag, onnx = (np.load(f"{path}.npz") for path in snippets)
    for found, expected in (
        (sentence, projected),
        (onnx, projected),
        (transformers, plain),
        (flag, plain),
    ):
        np.testing.assert_allclose(found["dense"], expected, atol=1e-5)
    for row in ("vectors0", "vectors1"):
        length = len(flag[row])
        np.testing.assert_allclose(flag[row], onnx[row][:length], atol=1e-5)
        assert flag[row].shape[1] == 32
