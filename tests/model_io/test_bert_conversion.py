"""BERT -> XLM-RoBERTa: exact hidden states, the layout of the folder, and what is refused.

Also that ``example_models.prepare`` converts once, on the same tiny BERT.
"""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer, XLMRobertaModel

from bge_pruning.datasets.text_files import hash_file
from bge_pruning.evaluation.encoders import SentenceTransformerEncoder, load_encoder
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.model_io import bert_conversion, example_models, pretrained, stand_in_heads
from bge_pruning.model_io.example_models import EXAMPLE_MODELS
from bge_pruning.model_io.model_folder import write_sentence_transformers_files
from tests.common.files import edit_json
from tests.common.models import write_again

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


def write_tiny_bert(
    folder: Path,
    pad_token_id: int = 0,
    pooler: bool = True,
    pooling: str | None = None,
    files: dict[str, bytes] | None = None,
) -> Path:
    """A random BERT in which every weight matters, and its tokenizer, or that of the files."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special.insert(pad_token_id, "[PAD]")
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=40)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=5, pad_id=pad_token_id)
    config = BertConfig(
        vocab_size=len(tokenizer) if files is None else 6036,  # more rows than tokens, as e5's
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
    if files is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(files[name])
    if pooling is not None:
        write_sentence_transformers_files(folder, pooling, 32, 40)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "source")


def convert(source: Path, output: Path, overwrite: bool = False) -> Path:
    """With stand-ins for heads."""

    def finish(folder: Path) -> dict[str, object]:
        return {"source": "tiny", **stand_in_heads.write_stand_ins(folder, SENTENCES)}

    return example_models.convert_bert_folder(source, output, finish, overwrite=overwrite)


@pytest.fixture(scope="module")
def converted(source):
    output = source.parent / "parent" / "converted"
    return convert(source, output)


def assert_equal_for_users(source: Path, output: Path) -> None:
    """Hidden states to the last bit, and the vectors of sentence-transformers."""
    pooler = "pooler.dense.weight" in pretrained.read_encoder(output).state
    bert = BertModel.from_pretrained(source, add_pooling_layer=pooler).eval()
    xlmr = XLMRobertaModel.from_pretrained(output, add_pooling_layer=pooler).eval()
    texts = [*SENTENCES, "the cat " * 60, "Die Katze sieht, 今天的天气很好!"]
    options = {"padding": True, "truncation": True, "max_length": 40, "return_tensors": "pt"}
    batch, again = (AutoTokenizer.from_pretrained(f)(texts, **options) for f in (source, output))
    # The last row of the position table is used.
    assert batch["input_ids"].shape == (len(texts), 40)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    with torch.no_grad():
        old, new = bert(**batch), xlmr(**again)
    real = batch["attention_mask"].bool()
    assert torch.equal(old.last_hidden_state[real], new.last_hidden_state[real])
    assert not pooler or torch.equal(old.pooler_output, new.pooler_output)
    if (source / "modules.json").is_file():
        vectors = [
            SentenceTransformer(str(f), device="cpu").encode(texts) for f in (source, output)
        ]
        assert abs(vectors[0] - vectors[1]).max() <= 1e-6


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("pooler", [True, False], ids=["pooler", "no pooler"])
@pytest.mark.parametrize("tokenizer", ["pad 0", "pad 1", "pad 3", "xlm-r"])
def test_a_bert_body_is_read_exactly(tokenizer, pooler, pooling, tmp_path, unigram_files):
    """``xlm-r`` is multilingual-e5-small: padding is 0 in ``config.json``, 1 to the tokenizer."""
    foreign = tokenizer == "xlm-r"
    pad = 0 if foreign else int(tokenizer[-1])
    files = unigram_files if foreign else None
    source = write_tiny_bert(tmp_path / "source", pad, pooler, pooling, files)
    base = pretrained.load_base_model(str(source))
    assert base.hf_config["pad_token_id"] == (1 if foreign else pad)
    assert base.heads.pooling == pooling and base.shape == pretrained.read_shape(source)
    assert (base.shape.type_vocab_size, base.max_seq_length) == (1, 40)
    assert_equal_for_users(source, write_again(source, tmp_path / "output"))


def test_old_names_and_missing_settings(tmp_path, source):
    """A language model of Google's: prefix, gamma and beta, output layer; no class, no tokens."""
    folder = write_tiny_bert(tmp_path / "old", pooling="mean")
    state = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in BertModel.from_pretrained(folder).state_dict().items()
    }
    torch.save({**state, "cls.predictions.bias": torch.ones(3)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    assert_equal_for_users(source, write_again(folder, tmp_path / "output"))
    config = json.loads((tmp_path / "output" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "BertTokenizer" and config["eos_token"] == "[SEP]"
    stored = json.loads((tmp_path / "output" / "config.json").read_text())
    assert (stored["bos_token_id"], stored["eos_token_id"]) == (2, 3)


def test_evaluation_reads_it_with_all_outputs_or_as_sentence_transformers(tmp_path, messages):
    folder = write_tiny_bert(tmp_path / "source", pooling="mean")
    torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    encoder = load_encoder(str(folder))
    assert isinstance(encoder, TextEncoder) and encoder.names() == ("dense_vecs", "token_weights")
    expected = SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)
    assert abs(encoder.encode(SENTENCES).dense_vecs - expected).max() <= 1e-6
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode_max_tokens=True)
    assert isinstance(load_encoder(str(folder)), SentenceTransformerEncoder)
    assert "only dense vectors, by sentence-transformers: " in messages.text


def test_tables_are_moved_and_no_pooler_is_made_up(tmp_path):
    state = {
        bert_conversion.POSITION_TABLE: torch.arange(6.0).reshape(3, 2),
        bert_conversion.TOKEN_TYPE_TABLE: torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "pooler.dense.bias": torch.ones(2),
    }
    converted = bert_conversion.convert_state_dict(state, pad_token_id=1)
    positions = converted[bert_conversion.POSITION_TABLE]
    assert positions.tolist() == [[0, 0], [0, 0], [0, 1], [2, 3], [4, 5]]
    assert converted[bert_conversion.TOKEN_TYPE_TABLE].tolist() == [[1, 2]]
    assert converted["pooler.dense.bias"] is state["pooler.dense.bias"]
    source = write_tiny_bert(tmp_path / "source", pooler=False)
    output = convert(source, tmp_path / "output")
    _, report = XLMRobertaModel.from_pretrained(output, output_loading_info=True)
    assert set(report["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config", {"position_embedding_type": "x"}, "position_embedding_type is 'x', expected 'a"),
        ("config", {"is_decoder": True}, "is_decoder is True, expected False"),
        ("config", {"model_type": "roberta"}, "model_type is 'roberta', expected 'xlm-roberta'"),
        ("config", {"num_hidden_layers": 3}, r"disagree: only in model: encoder\.layer\.2\."),
        ("config", {"type_vocab_size": 3}, r"disagree: .*token_type_embeddings"),
        ("tokenizer", {"added_tokens": []}, "there is no tokenizer.json with a padding token"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_xlmr_cannot_express_is_refused(tmp_path, file, changes, message):
    source = write_tiny_bert(tmp_path / "source")
    edit_json(source / f"{file}.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "output")
    with pytest.raises(ValueError, match=message):
        pretrained.load_base_model(str(source))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_verification_finds_one_wrong_weight(source, value):
    encoder = pretrained.read_encoder(source)
    bias = encoder.state["encoder.layer.1.output.dense.bias"].clone()
    bias[3] += value
    encoder.state["encoder.layer.1.output.dense.bias"] = bias
    with pytest.raises(
        ValueError, match=r"source: BERT's hidden states .* differ by .*1e-05.*To f"
    ):
        encoder.verify(str(source))


def test_files_of_a_converted_folder(converted):
    files = {path.relative_to(converted).as_posix() for path in converted.rglob("*")}
    assert files == set(
        "1_Pooling 1_Pooling/config.json 2_Normalize 2_Normalize/config.json colbert_linear.pt "
        "config.json config_sentence_transformers.json conversion.json model.safetensors "
        "modules.json sentence_bert_config.json sparse_linear.pt special_tokens_map.json "
        "tokenizer.json tokenizer_config.json".split()
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
    settings = json.loads((converted / "tokenizer_config.json").read_text())
    assert "max_length" not in settings and settings["model_max_length"] == 40


def test_no_folder_is_written_or_replaced(tmp_path, source, monkeypatch):
    (tmp_path / "kept").touch()
    with pytest.raises(FileExistsError, match="exists and is kept.*--overwrite"):
        convert(source, tmp_path)
    with pytest.raises(FileExistsError, match=r"holds no conversion\.json"):
        convert(source, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    monkeypatch.setattr(bert_conversion, "compute_largest_difference", lambda *_: 1e-4)
    with pytest.raises(ValueError, match=r"differ by 1\.00e-04"):
        convert(source, tmp_path / "output")
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
    path = source / "model.safetensors"
    model = replace(example_models.MINILM, sha256=hash_file(path))
    monkeypatch.setattr(example_models, "MINILM", model)
    monkeypatch.setattr(example_models, "find_source", lambda _: path)
    return model


@pytest.mark.parametrize("heads", [True, False])
def test_prepare_converts_once(heads, tmp_path, sentences, tiny_minilm, caplog):
    output, identity = tmp_path / "output", example_models.identify(tiny_minilm, heads)
    work = partial(example_models.prepare, tiny_minilm, output, sentences, heads=heads)
    assert not example_models.is_complete(output, identity)
    assert work() == output
    assert example_models.is_complete(output, identity)
    assert "apache-2.0" in (output / "README.md").read_text()
    assert ("stand-ins" in (output / "README.md").read_text()) == heads
    assert [(output / name).is_file() for name in example_models.HEADS] == [heads] * 2
    record = json.loads((output / example_models.RECORD_FILE).read_text())
    assert (record["source"], record["licence"]) == (tiny_minilm.name, "Apache-2.0")

    time = (output / "config.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        example_models.prepare(tiny_minilm, output, tmp_path / "not needed", heads=heads)
    assert "already holds sentence-transformers/all-MiniLM-L6-v2" in caplog.text
    assert (output / "config.json").stat().st_mtime_ns == time
    with pytest.raises(FileExistsError, match="exists and is kept"):  # with other heads
        example_models.prepare(tiny_minilm, output, sentences, heads=not heads)

    (output / "tokenizer.json").unlink()
    with pytest.raises(FileExistsError, match="exists and is kept"):
        work()
    work(overwrite=True)
    assert example_models.is_complete(output, identity)


@pytest.mark.parametrize("words", ["prepare_minilm.py", "prepare_model.py m3-small"])
def test_a_complete_folder_needs_no_torch(words, tmp_path):
    script, *rest = words.split()
    model = EXAMPLE_MODELS[rest[0] if rest else "minilm"]
    example_models.write_record(tmp_path, example_models.identify(model))
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[script, *rest, '--output', str(tmp_path)]!r}\n"
        f"try:\n    runpy.run_path('scripts/{script}', run_name='__main__')\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "0 False"
    assert "already holds" in run.stderr
