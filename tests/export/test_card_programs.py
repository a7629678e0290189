"""The programs of the card: run in a fresh process, they give what the model computes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from bge_pruning.export.extract import ExtractOptions, extract
from bge_pruning.model_io.model_files import read_special_ids
from bge_pruning.model_io.pretrained import load_base_model

TOOLS = ("sentence-transformers", "transformers", "FlagEmbedding", "ONNX Runtime")
PROGRAM = re.compile(r"^### ([^\n]+)\n\n```python\n(.*?)```", re.MULTILINE | re.DOTALL)
OWN = ["A plane is taking off.", "An air plane is taking off."]
# Of which the second is longer than the model allows: 78 tokens.
LONG = ["Structured pruning removes whole layers.", "A plane is taking off, yes; " * 30]
# Each program is a line of the input; its outputs are a line of the output.
RUN = """\
import json, sys

def plain(value):
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value

rows = []
for program in json.load(sys.stdin):
    names = {"__name__": "__main__"}
    exec(program, names)
    outputs = ("vectors", "similarities", "dense", "weights", "outputs")
    rows.append({name: plain(names[name]) for name in outputs if name in names})
rows.append(sorted({"bge_pruning", "composer"} & set(sys.modules)))
print("RESULT" + json.dumps(rows))
"""


@pytest.fixture
def folders(metadata, save_run, tmp_path) -> dict[str, Path]:
    """Extracted models of both poolings, one with a square head, one with a projection."""
    bias = {"heads.sparse_linear.bias": torch.tensor([1.0])}  # some tokens have a weight
    asked = {
        "cls": ExtractOptions(onnx=True),
        "mean": ExtractOptions(onnx=True),
        "square": ExtractOptions(square_head=True),
        "projected": ExtractOptions(keep_dimension=True, onnx=True),
    }
    for name, options in asked.items():
        pooling = "mean" if name == "mean" else "cls"
        run = save_run(replace(metadata, pooling=pooling), bias)
        extract(run, tmp_path / name, options=options)
        shape = json.loads((tmp_path / name / "pruning.json").read_text())["shape"]
        assert shape["hidden_size"] == 16
        assert shape["colbert_dim"] == (16 if name == "square" else 32)
    return {name: tmp_path / name for name in asked}


def run_programs(folders: dict[str, Path], elsewhere: Path) -> dict[tuple[str, str], list[Any]]:
    """What each tool gives for each folder: for the card's own texts, and for a long one."""
    code = {}
    for name, folder in folders.items():
        for tool, program in PROGRAM.findall((folder / "README.md").read_text(encoding="utf-8")):
            own = program.replace("THIS_FOLDER", str(folder))
            other = own.replace(f"texts = {json.dumps(OWN)}", f"texts = {LONG!r}")
            assert other != own
            code[tool, name] = [own, other]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([program for both in code.values() for program in both]),
        cwd=elsewhere,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *rows, imported = json.loads(done.stdout.partition("RESULT")[2])
    assert imported == []
    return {key: rows[2 * n : 2 * n + 2] for n, key in enumerate(code)}


def compute(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Outputs of each text alone, by the model of the folder."""
    from tokenizers import Tokenizer

    base = load_base_model(str(folder))
    tokenizer = Tokenizer.from_str(base.tokenizer_files["tokenizer.json"].decode())
    tokenizer.enable_truncation(78)
    special = read_special_ids(base.tokenizer_files)
    found: dict[str, Any] = {"ids": [], "dense": [], "weights": [], "lexical": [], "vectors": []}
    for text in texts:
        ids = tokenizer.encode(text).ids
        row = torch.tensor([ids])
        with torch.no_grad():
            hidden = base.backbone(row, torch.ones_like(row))
            outputs = base.heads.outputs(hidden, torch.ones_like(row))
        weights = outputs["token_weights"][0].tolist()
        lexical: dict[str, float] = {}
        for token, weight in zip(ids, weights, strict=True):
            if token not in special and weight > 0:
                lexical[str(token)] = max(weight, lexical.get(str(token), 0.0))
        found["ids"].append(ids)
        found["dense"].append(outputs["dense_vecs"][0])
        found["weights"].append(weights)
        found["lexical"].append(lexical)
        found["vectors"].append(outputs["colbert_vecs"][0])
    return {**found, "dense": torch.stack(found["dense"])}


def test_every_program_gives_the_models_outputs(folders, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    theirs = run_programs(folders, elsewhere)
    expected = {(tool, name) for tool in TOOLS for name in folders}
    assert set(theirs) == expected - {("ONNX Runtime", "square")}
    for name, folder in folders.items():
        for number, texts in enumerate((OWN, LONG)):
            ours = compute(folder, texts)
            if name == "projected":
                kept = json.loads((folder / "pruning.json").read_text())["kept"]["hidden"]
                whole = torch.zeros(2, 32)
                whole[:, kept] = ours["dense"]
                ours["dense"] = normalize(whole, dim=-1)
            found = {tool: rows[number] for (tool, of), rows in theirs.items() if of == name}
            assert_close(found["sentence-transformers"]["vectors"], ours["dense"])
            products = ours["dense"] @ ours["dense"].T
            assert_close(found["sentence-transformers"]["similarities"], products)
            assert_close(found["transformers"]["vectors"], ours["dense"])
            assert_flag(found["FlagEmbedding"], ours)
            if name != "square":
                assert_onnx(found["ONNX Runtime"]["outputs"], ours)
    assert ours["ids"][1][-1] == 2 and len(ours["ids"][1]) == 78  # it was long enough to be cut


def assert_close(found: list, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


def assert_flag(found: dict[str, Any], ours: dict[str, Any]) -> None:
    assert_close(found["dense"], ours["dense"])
    assert any(ours["lexical"])
    for index, lexical in enumerate(ours["lexical"]):
        assert found["weights"][index] == pytest.approx(lexical, abs=1e-5)
        assert_close(found["vectors"][index], ours["vectors"][index])


def assert_onnx(found: dict[str, Any], ours: dict[str, Any]) -> None:
    assert_close(found["dense_vecs"], ours["dense"])
    for index, ids in enumerate(ours["ids"]):
        count = len(ids)
        weights = torch.tensor(ours["weights"][index])
        assert_close(found["token_weights"][index][:count], weights)
        assert_close(found["colbert_vecs"][index][: count - 1], ours["vectors"][index])
