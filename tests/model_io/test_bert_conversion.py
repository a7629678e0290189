"""BERT -> XLM-RoBERTa: exact hidden states, the layout of the folder, and what is refused.

Also that ``minilm.prepare`` converts once, on the same tiny BERT.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    XLMRobertaModel,
)

from bge_pruning.datasets.text_files import hash_file
from bge_pruning.model_io import bert_conversion, minilm
from tests.common.files import edit_json

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "runs", "sleeps", "small", "big", "red"]
WORDS += ["old", "never", "often"]
SENTENCES = [
    "the cat sees a dog",
    "a small bird never sleeps",
    "the old dog often runs",
    "the cat hears the big red bird",
    "a dog sleeps",
    "the bird",
    "the xylophone runs",
]


def write_tiny_bert(folder: Path, pad_token_id: int = 0, pooler: bool = True) -> Path:
    """A random BERT in which every weight matters, and its tokenizer."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special.insert(pad_token_id, "[PAD]")
    tokenizer = BertTokenizer(
        vocab={word: i for i, word in enumerate([*special, *WORDS])}, model_max_length=40
    )
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=5, pad_id=pad_token_id)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        pad_token_id=pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=pooler)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "source")


@pytest.fixture(scope="module")
def converted(source):
    output = source.parent / "parent" / "converted"
    return bert_conversion.convert_bert_folder(source, output, SENTENCES, record={"source": "tiny"})


@pytest.mark.parametrize("pad_token_id", [0, 1, 3])
def test_hidden_states_are_exactly_equal(tmp_path, pad_token_id):
    source = write_tiny_bert(tmp_path / "source", pad_token_id)
    output = bert_conversion.convert_bert_folder(source, tmp_path / "output", SENTENCES)
    bert = BertModel.from_pretrained(source).eval()
    xlmr = XLMRobertaModel.from_pretrained(output).eval()
    texts = [*SENTENCES, "the cat " * 60]
    batch = AutoTokenizer.from_pretrained(output)(
        texts, padding=True, truncation=True, max_length=40, return_tensors="pt"
    )
    # The last row of the position table is used.
    assert batch["input_ids"].shape == (len(texts), 40)
    with torch.no_grad():
        old, new = bert(**batch), xlmr(**batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(old.last_hidden_state[real], new.last_hidden_state[real])
    assert torch.equal(old.pooler_output, new.pooler_output)


def test_tables_are_moved_and_no_pooler_is_made_up(tmp_path):
    state = {
        bert_conversion.POSITION_TABLE: torch.arange(6.0).reshape(3, 2),
        bert_conversion.TOKEN_TYPE_TABLE: torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "embeddings.position_ids": torch.arange(3),
        "pooler.dense.bias": torch.ones(2),
    }
    converted = bert_conversion.convert_state_dict(state, pad_token_id=1)
    positions = converted[bert_conversion.POSITION_TABLE]
    assert positions.tolist() == [[0, 0], [0, 0], [0, 1], [2, 3], [4, 5]]
    assert converted[bert_conversion.TOKEN_TYPE_TABLE].tolist() == [[1, 2]]
    assert "embeddings.position_ids" not in converted
    assert converted["pooler.dense.bias"] is state["pooler.dense.bias"]
    source = write_tiny_bert(tmp_path / "source", pooler=False)
    output = bert_conversion.convert_bert_folder(source, tmp_path / "output", SENTENCES)
    assert XLMRobertaModel.from_pretrained(output, add_pooling_layer=False).pooler is None
    _, report = XLMRobertaModel.from_pretrained(output, output_loading_info=True)
    assert set(report["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "x"}, "position_embedding_type is 'x', expected 'abs"),
        ({"is_decoder": True}, "is_decoder is True, expected False"),
        ({"pad_token_id": None}, "pad_token_id is missing, expected an integer"),
        (RobertaConfig().to_diff_dict(), "model_type is 'roberta', expected 'bert'"),
    ],
)
def test_what_xlmr_cannot_express_is_refused(tmp_path, changes, message):
    source = write_tiny_bert(tmp_path / "source")
    edit_json(source / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        bert_conversion.convert_bert_folder(source, tmp_path / "output", SENTENCES)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_incomplete_sources_are_refused(tmp_path):
    source = write_tiny_bert(tmp_path / "source")
    edit_json(source / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"the weights lack .*encoder\.layer\.2\."):
        bert_conversion.load_bert(source)
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json not found"):
        bert_conversion.load_bert(tmp_path / "nowhere")
    edit_json(source / "tokenizer_config.json", sep_token=None)
    with pytest.raises(ValueError, match="sep_token None"):
        bert_conversion.load_tokenizer(source)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_verification_finds_one_wrong_weight(tmp_path, source, converted, value):
    bert = BertModel.from_pretrained(source).eval()
    with torch.no_grad():
        bert.encoder.layer[1].output.dense.bias[3] += value
    with pytest.raises(
        RuntimeError, match=r"not equivalent: token ids agree, hidden states differ by .*1e-05"
    ):
        bert_conversion.verify_conversion(bert, source, converted, SENTENCES)


def test_files_of_a_converted_folder(converted):
    files = {path.relative_to(converted).as_posix() for path in converted.rglob("*")}
    assert files == set(
        "1_Pooling 1_Pooling/config.json 2_Normalize 2_Normalize/config.json colbert_linear.pt "
        "config.json config_sentence_transformers.json conversion.json model.safetensors "
        "modules.json sentence_bert_config.json sparse_linear.pt tokenizer.json "
        "tokenizer_config.json".split()
    )
    assert [path.name for path in converted.parent.iterdir()] == ["converted"]
    modes = {(converted / n).stat().st_mode for n in ("config.json", "model.safetensors")}
    assert len(modes) == 1
    record = json.loads((converted / "conversion.json").read_text())
    assert (record["source"], record["largest_difference"]) == ("tiny", 0.0)
    assert record["sentences"] == len(SENTENCES)
    paths = converted.rglob("*.*")
    sizes = {path.relative_to(converted).as_posix(): path.stat().st_size for path in paths}
    del sizes["conversion.json"]
    assert record["files"] == sizes
    config = json.loads((converted / "config.json").read_text())
    wanted = {
        "model_type": "xlm-roberta",
        "architectures": ["XLMRobertaModel"],
        "max_position_embeddings": 41,
        "type_vocab_size": 1,
        "position_embedding_type": "absolute",
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    assert {name: config[name] for name in wanted} == wanted
    pooling = json.loads((converted / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32
    assert (pooling["pooling_mode_mean_tokens"], pooling["pooling_mode_cls_token"]) == (True, False)
    sentence = json.loads((converted / "sentence_bert_config.json").read_text())
    # 256, cut to the position table.
    assert sentence == {"max_seq_length": 40, "do_lower_case": False}
    colbert = torch.load(converted / "colbert_linear.pt", weights_only=True)
    sparse = torch.load(converted / "sparse_linear.pt", weights_only=True)
    assert torch.equal(colbert["weight"], torch.eye(32))
    assert torch.equal(colbert["bias"], torch.zeros(32))
    sizes = {name: tuple(value.shape) for name, value in sparse.items()}
    assert sizes == {"weight": (1, 32), "bias": (1,)}
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in sparse.values())
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[CLS]", "[SEP]")
    assert set(tokenizer("the cat", "a dog")) == {"input_ids", "attention_mask"}
    assert len(tokenizer("the cat " * 10)["input_ids"]) == 22
    stored = json.loads((converted / "tokenizer.json").read_text())
    assert (stored["truncation"], stored["padding"]) == (None, None)
    assert "max_length" not in json.loads((converted / "tokenizer_config.json").read_text())


def test_no_folder_is_written_or_replaced(tmp_path, source, monkeypatch):
    (tmp_path / "kept").touch()
    with pytest.raises(FileExistsError, match="exists and is kept.*--overwrite"):
        bert_conversion.convert_bert_folder(source, tmp_path, SENTENCES)
    with pytest.raises(FileExistsError, match=r"holds no conversion\.json"):
        bert_conversion.convert_bert_folder(source, tmp_path, SENTENCES, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    monkeypatch.setattr(bert_conversion, "compute_largest_difference", lambda *_: 1e-4)
    with pytest.raises(RuntimeError, match=r"hidden states differ by 1\.00e-04"):
        bert_conversion.convert_bert_folder(source, tmp_path / "output", SENTENCES)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "sts.csv"
    path.write_text(
        "".join(f'"{text}","{text}, often",2.5\n' for text in SENTENCES), encoding="utf-8"
    )
    return path


@pytest.fixture
def tiny_minilm(source, monkeypatch):
    """The tiny BERT in the place of the packaged model."""
    monkeypatch.setattr(minilm, "find_source", lambda: source)
    monkeypatch.setattr(minilm, "SOURCE_SHA256", hash_file(source / "model.safetensors"))
    return source


def test_prepare_converts_once(tmp_path, sentences, tiny_minilm, caplog):
    output = tmp_path / "output"
    assert not minilm.is_complete(output, minilm.SOURCE_SHA256)
    assert minilm.prepare(output, sentences) == output
    assert minilm.is_complete(output, minilm.SOURCE_SHA256)
    assert "apache-2.0" in (output / "README.md").read_text()
    record = json.loads((output / minilm.RECORD_FILE).read_text())
    assert (record["source"], record["licence"]) == (minilm.MODEL_NAME, "Apache-2.0")

    time = (output / "config.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        minilm.prepare(output, tmp_path / "not needed")
    assert "already holds sentence-transformers/all-MiniLM-L6-v2" in caplog.text
    assert (output / "config.json").stat().st_mtime_ns == time

    (output / "sparse_linear.pt").unlink()
    with pytest.raises(FileExistsError, match="exists and is kept"):
        minilm.prepare(output, sentences)
    minilm.prepare(output, sentences, overwrite=True)
    assert minilm.is_complete(output, minilm.SOURCE_SHA256)


def test_a_complete_folder_needs_no_torch(tmp_path):
    record = {"source_sha256": minilm.SOURCE_SHA256, "files": {}}
    (tmp_path / minilm.RECORD_FILE).write_text(json.dumps(record))
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['prepare_minilm.py', '--output', {str(tmp_path)!r}]\n"
        "try:\n    runpy.run_path('scripts/prepare_minilm.py', run_name='__main__')\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "0 False"
    assert "already holds" in run.stderr
