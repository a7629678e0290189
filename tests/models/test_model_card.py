"""The README.md of an extracted model: what it says is true, and a hub can read it."""

from __future__ import annotations

import ast
import re
from dataclasses import asdict, replace

import pytest
import yaml

from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.models.model_card import render_model_card


@pytest.fixture
def make_info(bge_m3_shape):
    """A function that gives what a card is made from, for BGE-M3 cut to half its layers."""

    def make(base="BAAI/bge-m3", pooling="cls", source=bge_m3_shape, **sizes):
        shape = replace(source, **{"num_hidden_layers": 12, **sizes})
        return {
            "source": {"base_model": base},
            "source_shape": asdict(source),
            "shape": asdict(shape),
            "parameters": {
                "source": count_parameters(source).as_dict(),
                "extracted": count_parameters(shape).as_dict(),
            },
            "pooling": pooling,
            "largest_difference": 1.234e-6,
        }

    return make


def table(card: str) -> dict[str, list[str]]:
    rows = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("|")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def test_the_table_compares_sizes_and_parameters(make_info):
    assert table(render_model_card(make_info(intermediate_size=2048))) == {
        "": ["source", "this model"],
        "---": ["---:", "---:"],
        "layers": ["24", "12"],
        "hidden size": ["1,024", "1,024"],
        "attention heads": ["16", "16"],
        "intermediate size": ["4,096", "2,048"],
        "vocabulary": ["250,002", "250,002"],
        # A layer of BGE-M3 has 12,596,224; 2,048 units of 2,049 go, in each of 12.
        "encoder parameters": ["302,309,376", "100,798,464"],
        "embeddings parameters": ["264,395,776", "264,395,776"],
        "pooler parameters": ["1,049,600", "1,049,600"],
        "heads parameters": ["1,050,625", "1,050,625"],
        "total parameters": ["568,805,377", "367,294,465"],
    }


def test_the_numbers_of_the_table_are_bge_m3s():
    """What the table above claims, counted once more: 24 layers, 250,002 + 8,194 + 1 rows."""
    layer = 4 * (1024 * 1024 + 1024) + 4096 * (2 * 1024 + 1) + 1024 + 4 * 1024
    assert 24 * layer == 302_309_376
    assert 12 * (layer - 2048 * 2049) == 100_798_464
    assert (250_002 + 8_194 + 1 + 2) * 1024 == 264_395_776


@pytest.mark.parametrize(
    "base", ["BAAI/bge-m3", "/models/é 模型", "a: b # c", "{name} {0} %s", "x`y"]
)
def test_any_base_model_is_named(base, make_info):
    card = render_model_card(make_info(base))
    assert f"# Pruned from {base}\n" in card
    assert f"cut from `{base}` by" in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "sentence-transformers"


def test_the_hub_reads_the_front_matter(make_info):
    card = render_model_card(make_info())
    assert card.startswith("---\n")
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": [
            "sentence-transformers",
            "feature-extraction",
            "xlm-roberta",
            "structured-pruning",
        ],
    }


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_and_difference_are_named(pooling, make_info):
    card = " ".join(render_model_card(make_info(pooling=pooling)).split())
    assert "(largest difference 1.2e-06, float32)" in card
    assert f"`transformers.AutoModel` ({pooling} pooling, then L2 normalisation)" in card
    assert "The licence of the source model applies." in card
    assert "`pruning.json` lists the kept layers, heads, units and dimensions" in card


def heads_text(card: str) -> str:
    return re.search(r"normalisation\)(.*?)\. The licence", " ".join(card.split())).group(1)


FLAG = ", and with FlagEmbedding's `BGEM3FlagModel` for sparse and multi-vector outputs"


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({}, FLAG),
        (
            {"hidden_size": 512, "num_attention_heads": 8},
            FLAG + " (pass `colbert_dim=1024`)",
        ),
    ],
    ids=["whole", "narrower"],
)
def test_how_flag_embedding_loads_it(sizes, text, make_info):
    assert heads_text(render_model_card(make_info(**sizes))) == text


@pytest.mark.parametrize("change", [{"sparse_head": False}, {"colbert_dim": 0}])
def test_flag_embedding_is_not_named_without_both_heads(change, make_info, bge_m3_shape):
    """It would make random heads without a word."""
    source: EncoderShape = replace(bge_m3_shape, **change)
    card = render_model_card(make_info(source=source))
    assert heads_text(card) == ""
    assert "FlagEmbedding" not in card


def test_the_example_is_python(make_info):
    """It is run on a written folder in ``test_extraction.py``."""
    card = render_model_card(make_info())
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ast.parse(example)
    assert example.count("THIS_FOLDER") == 1


def test_the_text_is_whole(make_info):
    card = render_model_card(make_info())
    assert not re.search(r"\{\w*\}|None|nan", card)
    assert card.endswith(".\n")
    assert all(len(line) <= 100 for line in card.splitlines() if "FlagEmbedding" not in line)


def test_the_precision_is_named_with_what_it_costs(make_info):
    assert "The weights are" not in render_model_card(make_info())
    rounding = {"dense_cosine": 0.9999987, "dense_vecs": 1e-4}
    precision = {"dtype": "float16", "rounding": rounding, "as_loaded": 1e-3}
    card = " ".join(render_model_card({**make_info(), "precision": precision}).split())
    assert "The weights are float16: beside float32 weights, the lowest cosine of a" in card
    assert "two dense vectors is 0.999999." in card
