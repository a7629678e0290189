"""The README.md of an extracted model: what it says is true, and a hub can read it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from bge_pruning.export.model_card import render_model_card

INDEX = {
    **{"old": "/my/index", "new": "/my/model", "passages": 3000, "queries": 43, "top_k": 10},
    **{"agreement": 0.912, "agreement_interval": [0.88, 0.94], "same_first": 0.95, "chance": 0.003},
    "cosine": {"mean": 0.9876, "p5": 0.95},
}
ONNX = {
    **{"file": "onnx/model.onnx", "data": None, "bytes": 12_345_678},
    "outputs": ["last_hidden_state", "dense_vecs", "token_weights", "colbert_vecs"],
    "largest_difference": {"dense_vecs": 1e-7, "colbert_vecs": 3.21e-7},
}
INT8 = {
    **{"file": "onnx/model_quantized.onnx", "bytes": 4_567_890, "texts": 8, "spearman": None},
    "cosine": {"dense_vecs": {"mean": 0.9913, "min": 0.952}},
    "speed": {
        **{"device": "cpu", "threads": 4},
        **{"throughput_texts_per_s": {"ratio": 2.05}, "latency_ms": {"ratio": 0.5}},
    },
}
VOCABULARY = {
    "vocabulary": {"source": 250002, "kept": 30000, "required": 1234, "rows_saved": 220002},
    "scripts": ["LATIN"],
    "parameters": {"source": 1000, "trimmed": 600, "saved": 400, "share_saved": 0.4},
    "coverage": [
        {
            **{"corpus": "de.txt", "role": "chosen", "texts": 400, "tokens": 9000},
            **{"tokens_kept": 0.999, "texts_same": 0.98, "growth": 1.002},
            **{"unknown_before": 0.0, "unknown_after": 0.001},
        }
    ],
}


def table(card: str) -> dict[str, list[str]]:
    rows = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("|")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def section(card: str, heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return "" if found is None else found.group(1).strip()


def headings(card: str) -> list[str]:
    return re.findall(r"^## (.*)$", card, re.MULTILINE)


# What it is


def test_the_whole_card_in_order(make_info, evaluation):
    info = {**make_info(), "vocabulary": VOCABULARY, "onnx": ONNX, "onnx_int8": INT8}
    assert headings(render_model_card(info, evaluation, INDEX)) == [
        "What was removed",
        "How exact it is",
        "Vocabulary",
        "Quality",
        "Size and speed",
        "Vector compatibility",
        "How to load",
        "Limits",
        "Licence and citation",
    ]
    assert headings(render_model_card(make_info())) == [
        "What was removed",
        "How exact it is",
        "Quality",
        "How to load",
        "Limits",
        "Licence and citation",
    ]


def test_the_hub_reads_it(make_info, evaluation):
    card = ModelCard(render_model_card(make_info(), evaluation))
    assert card.data.license == "mit" and len(card.data.eval_results) == 3
    card.data.to_yaml()
    assert card.text.strip().startswith("# Pruned from BAAI/bge-m3\n")


@pytest.mark.parametrize(
    ("base", "title"),
    [
        ("BAAI/bge-m3", "BAAI/bge-m3"),
        ("/models/é 模型", "é 模型"),
        ("/my/a: b # c", r"a: b \# c"),
        ("{name} {0} %s", "{name} {0} %s"),
        ("x`y", r"x\`y"),
    ],
)
def test_any_base_model_is_named_and_no_path(base, title, make_info):
    card = render_model_card(make_info(base, origin=None))
    assert f"\n# Pruned from {title}\n" in card
    assert "/models/" not in card and "/my/" not in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "sentence-transformers"


def test_a_folder_is_called_by_the_name_that_it_has_on_the_hub(make_info):
    card = render_model_card(make_info("/my/folder", origin="owner/name"))
    assert "\n# Pruned from owner/name\n" in card
    assert "cut from [owner/name](https://huggingface.co/owner/name) by" in card
    assert "/my/folder" not in card


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_outputs_and_tools_are_named(pooling, make_info):
    said = f"It gives dense vectors of 1,024 dimensions ({pooling} pooling), sparse token weights"
    said += " and multi-vectors of 1,024 dimensions, and loads in transformers, "
    card = render_model_card(make_info(pooling=pooling))
    assert f"{said}sentence-transformers and FlagEmbedding without code of its own." in card
    card = render_model_card({**make_info(pooling=pooling), "onnx": ONNX})
    assert f"{said}sentence-transformers, FlagEmbedding and ONNX Runtime without" in card


@pytest.mark.parametrize(
    ("change", "outputs"),
    [
        ({"sparse_head": False}, "(cls pooling) and multi-vectors of 1,024 dimensions, and loads"),
        ({"colbert_dim": 0}, "(cls pooling) and sparse token weights, and loads"),
        ({"colbert_dim": 0, "sparse_head": False}, "(cls pooling), and loads"),
    ],
    ids=str,
)
def test_without_both_heads(change, outputs, make_info, bge_m3_shape):
    """FlagEmbedding would make random heads without a word."""
    card = render_model_card(make_info(original=replace(bge_m3_shape, **change)))
    assert f"dense vectors of 1,024 dimensions {outputs} in transformers and sentence-" in card
    assert "FlagEmbedding" not in card


def test_the_text_is_whole(make_info, evaluation):
    info = {**make_info(), "vocabulary": VOCABULARY, "onnx": ONNX, "onnx_int8": INT8}
    for card in (render_model_card(make_info()), render_model_card(info, evaluation, INDEX)):
        prose = re.sub(r"```.*?```", "", card, flags=re.DOTALL).partition("\n# ")[2]
        assert not re.search(r"\{\w*\}|\bNone\b|\bnan\b|  +\w", prose)
        assert card.endswith(".\n") and "\n\n\n" not in card


# What was removed, and how exact it is


def test_the_table_compares_sizes_and_parameters(make_info):
    card = section(render_model_card(make_info(intermediate_size=2048)), "What was removed")
    assert table(card) == {
        "": ["original", "this model", "kept"],
        "---": ["---:", "---:", "---:"],
        "layers": ["24", "12", "50.0%"],
        "hidden size": ["1,024", "1,024", "100.0%"],
        "attention heads": ["16", "16", "100.0%"],
        "intermediate size": ["4,096", "2,048", "50.0%"],
        "vocabulary": ["250,002", "250,002", "100.0%"],
        "multi-vector size": ["1,024", "1,024", "100.0%"],
        # A layer of BGE-M3 has 12,596,224; 2,048 units of 2,049 go, in each of 12.
        "encoder parameters": ["302,309,376", "100,798,464", "33.3%"],
        "embeddings parameters": ["264,395,776", "264,395,776", "100.0%"],
        "pooler parameters": ["1,049,600", "1,049,600", "100.0%"],
        "heads parameters": ["1,050,625", "1,050,625", "100.0%"],
        "total parameters": ["568,805,377", "367,294,465", "64.6%"],
    }


def test_the_numbers_of_the_table_are_bge_m3s():
    """What the table above claims, counted once more: 24 layers, 250,002 + 8,194 + 1 rows."""
    layer = 4 * (1024 * 1024 + 1024) + 4096 * (2 * 1024 + 1) + 1024 + 4 * 1024
    assert 24 * layer == 302_309_376
    assert 12 * (layer - 2048 * 2049) == 100_798_464
    assert (250_002 + 8_194 + 1 + 2) * 1024 == 264_395_776


def test_a_head_that_neither_has_has_no_row(make_info, bge_m3_shape):
    card = render_model_card(make_info(original=replace(bge_m3_shape, colbert_dim=0)))
    assert "multi-vector size" not in table(card)


def test_layers_and_training(make_info):
    said = section(render_model_card(make_info()), "What was removed")
    assert "Layers that stay, counted from 0: 0, 2, 4," in said
    assert "Trained for 1,200 batches of pruning and 600 batches of recovery. `prun" in said
    info = {**make_info(), "batches": {"train": 7}}
    assert "Trained for 7 batches of training without gates." in render_model_card(info)
    fitted = section(render_model_card({**make_info(), "refit_texts": 1024}), "What was removed")
    assert "The recovery began by fitting its layers" in fitted
    assert "least squares, on up to 1,024 training texts. `pruning.json`" in fitted


def exactness(info) -> str:
    return section(render_model_card(info), "How exact it is")


def test_the_difference_is_named(make_info):
    assert "(largest difference 1.2e-06, float32)." in exactness(make_info())


def test_the_precision_is_named_with_what_it_costs(make_info):
    assert "The weights are" not in exactness(make_info())
    rounding = {"dense_cosine": 0.9999987, "dense_vecs": 1e-4}
    precision = {"dtype": "float16", "rounding": rounding, "as_loaded": 1e-3}
    said = exactness({**make_info(), "precision": precision})
    assert "float32). The weights are float16: beside float32 weights, the lowest cosine" in said
    assert "two dense vectors is 0.999999." in said


def test_a_square_multi_vector_head_is_named(make_info):
    turned = {"source_dim": 1024, "colbert_dim": 768, "largest_difference": 3.4e-7}
    said = exactness({**make_info(), "multi_vector": turned})
    assert "turned from 1,024 to 768 dimensions by an orthogonal change of basis" in said
    assert "vectors moved by 3.4e-07 at most." in said


def test_onnx_and_int8_are_named_with_what_they_lose(make_info):
    said = exactness({**make_info(), "onnx": ONNX, "onnx_int8": INT8})
    same = "`onnx/model.onnx` (12.3 MB) gave the same outputs as torch (largest difference "
    assert f"{same}3.2e-07)" in said
    rounded = "`onnx/model_quantized.onnx` (4.57 MB) is rounded to int8: cosine to float32 0.9913"
    assert rounded in said and "the time of one text (measured on cpu, 4 threads)." in said


# Vocabulary, quality, compatibility


def test_a_trimmed_vocabulary(make_info):
    info = {**make_info(vocab_size=30000), "vocabulary": VOCABULARY}
    card = render_model_card(info)
    assert "| de.txt | chosen | 400 | 9,000 | 99.90% |" in section(card, "Vocabulary")
    said = "`vocab_map.json` holds for each id that of the vocabulary before it was trimmed."
    assert said in section(card, "Limits")
    assert "vocab_map.json" not in render_model_card(make_info())


def test_quality_that_was_not_measured(make_info):
    said = section(render_model_card(make_info()), "Quality")
    assert said.startswith("Quality: not measured. ")
    assert "`python scripts/evaluate_model.py THIS_FOLDER --baseline BAAI/bge-m3 --sts FILE" in said
    assert "`python scripts/write_model_card.py THIS_FOLDER --evaluation evaluation.json`" in said
    assert "--baseline ORIGINAL " in render_model_card(make_info("/a/b", origin=None))
    assert section(render_model_card(make_info(), {"tasks": []}), "Quality") == said


def test_quality_beside_floors(make_info, evaluation):
    said = section(render_model_card(make_info(), evaluation), "Quality")
    row = "| 0.8400 | 0.8124 | 0.790 to 0.830 | 0.4300 | 0.5100 | 96.7% | 91.6% | 0.040 |"
    assert f"| stsb-en-test | dense | Spearman {row}" in said
    assert "without any encoder are floors" in said and "kept above floor" in said
    assert r"my \<docs\>: 3 of 100 texts are longer than the limit" in said
    assert "Pearson" not in said and "`evaluation.json` holds all scores." in said


def test_size_and_speed(make_info, evaluation):
    said = section(render_model_card(make_info(), evaluation), "Size and speed")
    assert "| weights on disk | 28.0 MB | 20.0 MB | 71.4% |" in said
    assert "| one text, median | 5.0 ms | 5.0 ms | 0.50 (0.40 to 0.62) |" in said
    assert "| batches of 8, sorted by length | 100 texts/s | 180 texts/s |" in said
    evaluation["speed"] = None
    assert "Speed: not measured." in render_model_card(make_info(), evaluation)


@pytest.mark.parametrize(
    ("kind", "texts", "said"),
    [
        ("selection", None, "Dimensions that were removed are 0 in them."),
        ("fitted", 20000, "was fitted by least squares on 20,000 texts."),
    ],
)
def test_a_projection(kind, texts, said, make_info):
    info = make_info(hidden_size=768, num_attention_heads=12)
    info["projection"] = {"kind": kind, "dimensions": 1024, "texts": texts}
    card = render_model_card(info)
    found = section(card, "Vector compatibility")
    assert "Dense vectors live in the 1,024 dimensions of the original" in found and said in found
    assert "It gives dense vectors of 1,024 dimensions" in card
    assert "The map, `2_Dense`, has 786,432 parameters more." in found
    assert "made anew" not in card
    assert "How well: not measured." in found and "write_model_card.py THIS_FOLDER --index" in found
    measured = section(render_model_card(info, None, INDEX), "Vector compatibility")
    assert "not measured" not in measured and "finds 91.2%" in measured


def test_an_index_that_was_searched(make_info):
    found = section(render_model_card(make_info(), None, INDEX), "Vector compatibility")
    assert "finds 91.2% (95 % interval 88.0% to 94.0%; chance 0.3%)" in found
    assert "0.9876 on average" in found and "/my/" not in found


# Limits


def test_limits(make_info):
    said = section(render_model_card(make_info()), "Limits")
    assert "* Texts are cut at 8,192 tokens.\n" in said
    assert "an index" not in said
    said = section(render_model_card({**make_info(), "max_seq_length": 512}), "Limits")
    assert "* Texts are cut at 512 tokens.\n" in said


def test_narrower_vectors_need_a_new_index(make_info):
    info = make_info(hidden_size=768, num_attention_heads=12)
    said = section(render_model_card(info), "Limits")
    assert "Dense vectors have 768 dimensions, not 1,024: an index of the original's" in said
