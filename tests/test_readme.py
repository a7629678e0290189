"""What the README says is there and is true."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bge_pruning.config import load_config
from bge_pruning.models.encoder_shape import count_parameters
from bge_pruning.plan import build_plan

ROOT = Path(__file__).parents[1]
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


def test_target_of_the_quickstart_is_the_computed_one():
    plan = build_plan(load_config([ROOT / "configs" / "minilm" / "quickstart.yaml"]))
    assert f"{count_parameters(plan.source).encoder:,}" in TEXT
    assert f"{count_parameters(plan.target).encoder:,}" in TEXT


@pytest.mark.parametrize("yaml", re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
def test_configurations_load(yaml, tmp_path):
    path = tmp_path / "readme.yaml"
    path.write_text(yaml.replace("    - ...", "    #"), encoding="utf-8")
    load_config([path])


def test_onnx_snippet_gives_the_models_outputs(model_folder, tmp_path):
    from bge_pruning.evaluation.text_encoder import TextEncoder
    from bge_pruning.export.onnx_export import export_onnx
    from bge_pruning.models.pretrained import load_base_model

    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "import onnxruntime" in block]
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    export_onnx(folder)
    found: dict[str, Any] = {}
    exec(code.replace("experiments/results/quickstart/model", str(folder)), found)
    texts = re.findall(r'encode_batch\(\["(.*?)", "(.*?)"\]\)', code)[0]
    expected = TextEncoder(load_base_model(str(folder))).encode(texts)
    np.testing.assert_allclose(found["dense"], expected.dense_vecs, atol=1e-5)
    tokens = max(len(text.ids) for text in found["batch"])
    assert found["weights"].shape == (2, tokens)
    assert found["vectors"].shape == (2, tokens - 1, 32)
