"""The programs of the card: run in a fresh process, they give what the model computes."""

from __future__ import annotations

import ast
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

from bge_pruning.export.card_loading import PLACE, TEXTS, longest_text, render_loading
from bge_pruning.export.extract import ExtractOptions, extract
from bge_pruning.export.model_card import render_model_card
from bge_pruning.model_io.model_files import read_special_ids
from bge_pruning.model_io.pretrained import load_base_model

TOOLS = ("sentence-transformers", "transformers", "FlagEmbedding", "ONNX Runtime")
# Of which the second is longer than the model allows: 78 tokens.
LONG = ["Structured pruning removes whole layers.", "A plane is taking off, yes; " * 30]
RUN = """\
import json, sys

def plain(value):
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value

tool, *programs = sys.argv[1:]
rows = []
for program in programs:
    names = {"__name__": "__main__"}
    exec(program, names)
    rows.append({name: plain(names[name]) for name in OUTPUTS if name in names})
rows.append(sorted({"bge_pruning", "composer"} & set(sys.modules)))
print("RESULT" + json.dumps(rows))
""".replace("OUTPUTS", repr(["vectors", "similarities", "dense", "weights", "outputs"]))


def programs(card: str) -> dict[str, str]:
    return dict(re.findall(r"^### ([^\n]+)\n\n```python\n(.*?)```", card, re.MULTILINE | re.DOTALL))


def run_tool(tool: str, folders: dict[str, Path], elsewhere: Path) -> dict[str, list[Any]]:
    """What a tool's program gives for each folder: for its own texts, and for a long one."""
    code = []
    for folder in folders.values():
        own = programs((folder / "README.md").read_text(encoding="utf-8"))[tool]
        own = own.replace(PLACE, str(folder))
        code += [own, own.replace(TEXTS, f"texts = {LONG!r}")]
        assert code[-1] != own
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, tool, *code],
        cwd=elsewhere,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *rows, imported = json.loads(done.stdout.partition("RESULT")[2])
    assert imported == []
    return {name: rows[2 * n : 2 * n + 2] for n, name in enumerate(folders)}


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
        info = extract(run, tmp_path / name, options=options)
        assert info["shape"]["hidden_size"] == 16
        assert info["shape"]["colbert_dim"] == (16 if name == "square" else 32)
    return {name: tmp_path / name for name in asked}


def test_every_program_gives_the_models_outputs(folders, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with_onnx = {name: folder for name, folder in folders.items() if name != "square"}
    theirs = {
        tool: run_tool(tool, with_onnx if tool == "ONNX Runtime" else folders, elsewhere)
        for tool in TOOLS
    }
    own = ast.literal_eval(TEXTS.removeprefix("texts = "))
    for name, folder in folders.items():
        for number, texts in enumerate((own, LONG)):
            ours = compute(folder, texts)
            if name == "projected":
                kept = json.loads((folder / "pruning.json").read_text())["kept"]["hidden"]
                whole = torch.zeros(2, 32)
                whole[:, kept] = ours["dense"]
                ours["dense"] = normalize(whole, dim=-1)
            found = {tool: rows[name][number] for tool, rows in theirs.items() if name in rows}
            assert_close(found["sentence-transformers"]["vectors"], ours["dense"])
            products = ours["dense"] @ ours["dense"].T
            assert_close(found["sentence-transformers"]["similarities"], products)
            assert_close(found["transformers"]["vectors"], ours["dense"])
            assert_flag(found["FlagEmbedding"], ours)
            assert ("ONNX Runtime" in found) == (name in with_onnx)
            if name in with_onnx:
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


# What each program says


def test_every_program_is_python_for_this_folder(make_info):
    info = make_info()
    info["onnx"] = {"file": "onnx/model.onnx", "outputs": ["dense_vecs"]}
    info["projection"] = {"kind": "selection", "dimensions": 1024, "texts": None}
    found = programs("\n\n".join(render_loading(info)))
    assert tuple(found) == TOOLS
    for program in found.values():
        ast.parse(program)
        assert PLACE in program and TEXTS in program
        assert all(len(line) <= 100 for line in program.splitlines())


def test_the_first_program_is_that_of_sentence_transformers(make_info):
    card = render_model_card(make_info())
    first = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    assert first.startswith("from sentence_transformers import SentenceTransformer\n")


def test_colbert_dim_is_named_only_where_it_is_needed(make_info):
    assert "colbert_dim" not in "\n".join(render_loading(make_info()))
    narrow = {"hidden_size": 512, "num_attention_heads": 8}
    assert "colbert_dim=1024)" in "\n".join(render_loading(make_info(**narrow)))
    square = "\n".join(render_loading(make_info(**narrow, colbert_dim=512)))
    assert "colbert_dim" not in square


@pytest.mark.parametrize("change", [{"sparse_head": False}, {"colbert_dim": 0}], ids=str)
def test_flag_embedding_is_left_out_without_both_heads(change, make_info, bge_m3_shape):
    said = "\n".join(render_loading(make_info(original=replace(bge_m3_shape, **change))))
    assert "FlagEmbedding" not in said and "BgeM3EmbeddingModel" not in said


def test_the_outputs_of_the_graph_are_asked_for(make_info):
    info = make_info()
    outputs = ["last_hidden_state", "dense_vecs", "colbert_vecs"]
    info["onnx"] = {"file": "onnx/model.onnx", "outputs": outputs}
    said = "\n".join(render_loading(info))
    assert '"dense_vecs",  #' in said and '"colbert_vecs",  #' in said
    assert "token_weights" not in said and "lexical weight of a token" not in said
    info["onnx_int8"] = {"file": "onnx/model_quantized.onnx"}
    assert "`onnx/model_quantized.onnx` is the same graph" in "\n".join(render_loading(info))


def servers(info: dict[str, Any]) -> str:
    return "\n".join(render_loading(info)).partition("### text-embeddings-inference and vLLM")[2]


def test_servers_are_said_to_be_untested(make_info):
    said = servers(make_info())
    assert "text-embeddings-router --model-id THIS_FOLDER\n" in said
    assert "Not tested here; the folder has the files and keys that they read." in said


def test_vllm_gives_all_outputs_only_where_it_can(make_info):
    overrides = """--hf-overrides '{"architectures": ["BgeM3EmbeddingModel"]}'  # all three"""
    assert overrides in servers(make_info())
    narrow = {"hidden_size": 512, "num_attention_heads": 8}
    for other in (make_info(**narrow), make_info(pooling="mean")):
        assert "BgeM3EmbeddingModel" not in servers(other)
        assert "vllm serve THIS_FOLDER --runner pooling\n" in servers(other)


def test_servers_may_not_know_a_projection(make_info):
    info = make_info(hidden_size=512, num_attention_heads=8)
    assert "2_Dense" not in servers(info)
    info["projection"] = {"kind": "selection", "dimensions": 1024, "texts": None}
    assert "does not apply `2_Dense` gives vectors of 512 dimensions" in servers(info)


def test_longest_text(make_info):
    assert longest_text(make_info()) == 8192
    assert longest_text({**make_info(), "max_seq_length": 512}) == 512
