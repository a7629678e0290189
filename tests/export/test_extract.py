"""What can be asked for beside the cut: each option alone and all together keep the law.

What other programs get of the folders is in ``test_loaders.py``.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bge_pruning.export import extract as module
from bge_pruning.export import extraction, keep_dimension
from bge_pruning.export.extract import ExtractOptions
from bge_pruning.export.folder_check import FolderError, check_folder
from bge_pruning.export.keep_dimension import add_projection
from bge_pruning.export.validation import ValidationError
from bge_pruning.export.vocabulary_texts import VocabularyRequest
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.utils.records import PruningRecord
from tests.common.trainings import extract_json as extract

# Their words are all of "kept" tokens below.
TEXTS = ["A plane is taking off.", "Yes.", "the heads of a model turn a text into a vector."]
# A bias that lifts some token weights above 0, not all.
LIFT = {"heads.sparse_linear.bias": torch.tensor([1.0])}


@pytest.fixture
def texts(tmp_path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS * 2) + "\n", encoding="utf-8")
    return str(path)


def everything(texts: str, **changes: Any) -> ExtractOptions:
    options = ExtractOptions(
        square_head=True, keep_dimension=True, vocabulary=VocabularyRequest((texts,)), onnx=True
    )
    return replace(options, **changes)


def test_the_record_of_everything(save_run, metadata, texts, tmp_path, target_shape):
    pairs = (TEXTS[:2], TEXTS[1:], [3.0, 1.0])
    options = everything(texts, onnx_int8=True, int8_pairs=pairs)
    info = extract(save_run(metadata, LIFT), tmp_path / "small", options=options)
    kept = info["vocabulary"]["vocabulary"]["kept"]
    shape = replace(target_shape, vocab_size=kept, colbert_dim=16)
    assert 10 < kept < 99
    assert info["shape"] == asdict(shape)
    assert info["projection"] == {"kind": "selection", "dimensions": 32, "texts": None}
    head = info["multi_vector"]
    assert (head["source_dim"], head["colbert_dim"]) == (32, 16)
    assert 0 < head["largest_difference"] < 1e-5
    assert info["onnx"]["file"] == "onnx/model.onnx"
    assert (tmp_path / "small" / info["onnx_int8"]["file"]).is_file()
    assert (info["onnx_int8"]["texts"], info["onnx_int8"]["spearman"]["pairs"]) == (3, 2)
    check_folder(tmp_path / "small", shape)
    saved = info["vocabulary"]["parameters"]
    assert saved["saved"] == (99 - kept) * 16
    assert info["parameters"]["extracted"]["embeddings"] == (kept + 80 + 1 + 2) * 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_precision_with_everything(dtype, save_run, metadata, texts, tmp_path):
    """The square head is rounded as it is written: the law holds, to 1e-5."""
    info = extract(
        save_run(metadata, LIFT), tmp_path / "small", options=everything(texts, dtype=dtype)
    )
    assert info["largest_difference"] <= 1e-5
    assert 1e-5 < info["precision"]["rounding"]["colbert_vecs"] < 0.1
    assert max(info["onnx"]["largest_difference"].values()) <= 1e-5


def test_a_plain_extraction_is_what_servers_demand(run, tmp_path, target_shape):
    info = extract(run, tmp_path / "small")
    extra = {"vocabulary", "multi_vector", "projection", "onnx", "onnx_int8", "precision"}
    assert not extra & set(info)
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert not {"onnx", "2_Dense", "vocab_map.json"} & names
    check_folder(tmp_path / "small", target_shape)
    with pytest.raises(FolderError):
        check_folder(tmp_path / "small", EncoderShape(**{**asdict(target_shape), "vocab_size": 7}))


@pytest.fixture
def run_with_head(metadata, save_run) -> Callable[[int], Path]:
    """A function that gives a run whose multi-vectors have a size."""

    def run_with_head(size: int) -> Path:
        target = {**metadata.l0_module["target"], "colbert_dim": size}
        gates = {**metadata.l0_module, "target": target}
        shape = {**metadata.shape, "colbert_dim": size}
        return save_run(replace(metadata, shape=shape, l0_module=gates))

    return run_with_head


def test_no_head_to_make_square(run_with_head, refuses):
    message = r"no multi-vector head to make square\. To fix, leave --colbert-dim out"
    refuses(ValueError, message, run_with_head(0), square_head=True)


def test_a_small_head_is_made_square_with_zeros(run_with_head, tmp_path):
    info = extract(run_with_head(8), tmp_path / "small", options=ExtractOptions(square_head=True))
    assert info["multi_vector"].pop("largest_difference") < 1e-6
    assert info["multi_vector"] == {"source_dim": 8, "colbert_dim": 16}
    head = torch.load(tmp_path / "small" / "colbert_linear.pt", weights_only=True)
    assert head["weight"].shape == (16, 16) and not head["weight"][8:].any()
    assert "dimensions are followed by zeros" in (tmp_path / "small" / "README.md").read_text()


def test_a_model_with_all_dimensions_needs_neither_map_nor_head(
    metadata, save_run, tmp_path, tiny_shape
):
    run = save_run(replace(metadata, l0_module=None))
    info = extract(
        run, tmp_path / "small", options=ExtractOptions(square_head=True, keep_dimension=True)
    )
    assert "projection" not in info
    assert not (tmp_path / "small" / "2_Dense").exists()
    assert "multi_vector" not in info
    assert info["shape"] == asdict(tiny_shape)


@pytest.fixture
def many_texts(tmp_path) -> str:
    """Forty different texts of the tiny model's words."""
    generator = np.random.default_rng(3)
    words = [word.strip(".,") for text in TEXTS for word in text.split()]
    path = tmp_path / "many.txt"
    lines = dict.fromkeys(" ".join(generator.choice(words, 6)) for _ in range(60))
    path.write_text("\n".join(list(lines)[:40]) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def source_folder(metadata, tiny_shape, build_model, tmp_path) -> Path:
    """The unpruned model that the run started from, as a folder."""
    from bge_pruning.model_io.model_folder import write_model_folder

    folder = tmp_path / "source"
    folder.mkdir()
    backbone, heads = build_model(tiny_shape, torch.float32)
    files = metadata.tokenizer_files
    write_model_folder(folder, backbone, heads, tiny_shape, metadata.hf_config, files, 78)
    return folder


def test_a_map_fitted_on_texts_comes_nearer(
    metadata, save_run, source_folder, many_texts, tmp_path
):
    from sentence_transformers import SentenceTransformer

    run = save_run(replace(metadata, base_model=str(source_folder)))
    lines = Path(many_texts).read_text(encoding="utf-8").splitlines()
    original = SentenceTransformer(str(source_folder), device="cpu").encode(lines)
    cosines = {}
    for name, files in (("selection", ()), ("fitted", (many_texts,))):
        options = ExtractOptions(keep_dimension=True, fit_texts=files)
        info = extract(run, tmp_path / name, options=options)
        assert info["projection"]["kind"] == name
        assert info["projection"]["texts"] == (40 if files else None)
        vectors = SentenceTransformer(str(tmp_path / name), device="cpu").encode(lines)
        cosines[name] = float((vectors * original).sum(axis=1).mean())
    assert cosines["fitted"] > cosines["selection"] + 0.01


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({}, None, ["a", "b"]),
        ({"query": "q: ", "passage": "p: "}, None, ["q: a", "q: b", "p: a", "p: b"]),
        ({"query": "q: "}, None, ["q: a", "q: b", "a", "b"]),  # passages have none
        ({"x": "x: "}, "x", ["a", "b", "x: a", "x: b"]),
    ],
)
def test_a_map_is_fitted_to_texts_as_they_are_embedded(
    prompts, default, expected, metadata, save_run, source_folder, tmp_path, monkeypatch
):
    """With the prompts of the model; the map is used by its queries and passages."""
    texts = {"prompts": prompts, "default_prompt_name": default}
    (source_folder / "config_sentence_transformers.json").write_text(json.dumps(texts))
    seen = []

    def embed(base: BaseModel, lines: list[str]) -> np.ndarray:
        seen.append(lines)
        return np.eye(32, base.dense_size(), dtype=np.float32)

    monkeypatch.setattr(keep_dimension, "_embed", embed)
    path = tmp_path / "fit.txt"
    path.write_text("a\nb\n")
    run = save_run(replace(metadata, base_model=str(source_folder), prompts=texts))
    options = ExtractOptions(keep_dimension=True, fit_texts=(str(path),))
    extract(run, tmp_path / "small", options=options)
    assert seen == [expected, expected]


def test_a_source_of_another_size_or_with_a_map_of_its_own(
    metadata, save_run, run, many_texts, tmp_path, refuses
):
    """An index of it has the dimensions of that map; the gates were those of its encoder's."""
    extract(run, tmp_path / "other")
    first = extract(run, tmp_path / "first", options=ExtractOptions(keep_dimension=True))
    run = save_run(replace(metadata, base_model=str(tmp_path / "other")))
    message = r"has 16 dimensions, but the model that was pruned had 32\. To fix"
    refuses(ValueError, message, run, keep_dimension=True, fit_texts=(many_texts,))
    again = replace(metadata, base_model=str(tmp_path / "first"), source_pruning=first)
    run = save_run(again)
    message = r"first was itself written with --keep-dimension: its vectors have 32 dim.* To fix"
    for files in ((many_texts,), ()):
        refuses(ValueError, message, run, keep_dimension=True, fit_texts=files)
    assert extract(run, tmp_path / "second")["source"]["projection"] == first["projection"]


def test_wrong_maps_and_heads_are_not_delivered(run, monkeypatch, refuses):

    insert = keep_dimension._insert
    monkeypatch.setattr(keep_dimension, "_insert", lambda folder, p: insert(folder, p.flip(0)))
    message = r"with the Dense module sentence-transformers is .* off, more than 1e-05\. To fix"
    refuses(ValidationError, message, run, keep_dimension=True)

    narrow = extraction.square_head

    def wrong(head: torch.nn.Linear, norm: torch.nn.LayerNorm) -> torch.nn.Linear:
        result = narrow(head, norm)
        result.bias.add_(0.01)
        return result

    monkeypatch.setattr(extraction, "square_head", torch.no_grad()(wrong))
    message = r"the square multi-vector head moves a score by \d\.\de-0\d, more than 1e-05\. To fix"
    refuses(ValidationError, message, run, square_head=True)


def test_a_projection_keeps_prompts_pooling_and_length(metadata, save_run, tmp_path):
    prompts = {"prompts": {"query": "the plane: "}, "default_prompt_name": None}
    run = save_run(replace(metadata, prompts=prompts, pooling="mean", max_seq_length=40))
    info = extract(run, tmp_path / "plain")
    extract(run, tmp_path / "kept", options=ExtractOptions(keep_dimension=True))
    for name in (
        "1_Pooling/config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
    ):
        assert (tmp_path / "kept" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert add_projection(tmp_path / "plain", PruningRecord(**info)).kind == "selection"


def test_kept_texts_keep_their_vectors(texts, metadata, save_run, tmp_path):
    """No tokenizer of the old vocabulary is left: FlagEmbedding would read it."""
    from sentence_transformers import SentenceTransformer

    files = {**metadata.tokenizer_files, "sentencepiece.bpe.model": b"old"}
    run = save_run(replace(metadata, tokenizer_files=files))
    extract(run, tmp_path / "whole")
    options = ExtractOptions(vocabulary=VocabularyRequest((texts,)))
    extract(run, tmp_path / "trimmed", options=options)
    whole, trimmed = (
        SentenceTransformer(str(tmp_path / name), device="cpu").encode(TEXTS)
        for name in ("whole", "trimmed")
    )
    assert np.array_equal(whole, trimmed)
    assert (tmp_path / "whole" / "sentencepiece.bpe.model").is_file()
    assert not (tmp_path / "trimmed" / "sentencepiece.bpe.model").exists()


def test_without_onnx_it_is_said_before_the_model_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(module, "start_extraction", lambda *_: pytest.fail("reads the model"))
    with pytest.raises(ImportError, match=r"onnx.*To fix"):
        extract(run, tmp_path / "small", options=ExtractOptions(onnx=True))


@pytest.mark.parametrize("step", ["export_onnx", "add_projection", "check_folder"])
def test_nothing_stays_of_what_fails_late(step, run, monkeypatch, refuses):
    def fail(*_: Any) -> None:
        raise RuntimeError("late")

    monkeypatch.setattr(module, step, fail)
    refuses(RuntimeError, "late", run, onnx=True, keep_dimension=True)
    gone = VocabularyRequest(("gone.txt",))
    refuses(FileNotFoundError, r"gone\.txt: no such file\. To fix", run, vocabulary=gone)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("tokenizer", "pad_token", "</s>", "padding token has not the id that config.json names"),
        ("sentence_bert", "max_seq_length", 79, "is 79, but there are positions for 78 tokens"),
    ],
)
def test_what_only_servers_would_stumble_over_is_not_delivered(
    name, key, value, message, run, monkeypatch, refuses
):
    validate = module.validate

    def validate_and_change(folder: Path, *args: Any) -> float:
        difference = validate(folder, *args)
        path = folder / f"{name}_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        return difference

    monkeypatch.setattr(module, "validate", validate_and_change)
    refuses(FolderError, message, run)
