"""Tokenizer files of fewer tokens: the same tokens under new ids, in every file that names ids."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from bge_pruning.export.vocabulary import choose_vocabulary, trim_vocabulary
from bge_pruning.export.vocabulary_files import (
    read_tokenizer,
    read_vocabulary_map,
    rewrite_tokenizer_files,
    special_ids,
)
from bge_pruning.model_io.hub import no_loading_bars
from bge_pruning.model_io.model_folder import write_model_folder
from bge_pruning.model_io.pretrained import load_base_model

TEXTS = [
    "The president said that the president would not answer, 1 or 2 times.",
    "Die Bahn kommt heute wieder zu spät, sagte der Präsident.",
    "这是一个关于天气的问题。",
    "Yes.",
]
LETTERS = "abcd"
WORDS = st.text(LETTERS, min_size=1, max_size=9)
# Tenths are not exact, so sums are rounded; few different ones, so there are many ties.
PIECES = st.dictionaries(
    st.text(LETTERS[:3], min_size=1, max_size=4),
    st.integers(-6, -1).map(lambda tenths: tenths / 10),
    min_size=2,
    max_size=25,
)


def ids_of(files: dict[str, bytes], texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def rewrite(files: dict[str, bytes], old_ids: list[int]) -> dict[str, bytes]:
    return rewrite_tokenizer_files(read_tokenizer(files), files, np.array(old_ids))


def check_kept_texts(content: bytes, kept: set[int], texts: list[str]) -> int:
    """Compare the tokens of every kept text; return how many there are."""
    files = {"tokenizer.json": content}
    old_ids = sorted(kept)
    trimmed, found = rewrite(files, old_ids), 0
    for before, after in zip(ids_of(files, texts), ids_of(trimmed, texts), strict=True):
        if set(before) <= kept:
            assert [old_ids[new] for new in after] == before
            found += 1
    return found


@given(pieces=PIECES, texts=st.lists(WORDS, max_size=30), draw=st.data())
def test_a_kept_text_keeps_its_unigram_pieces(make_unigram, pieces, texts, draw):
    """Also where scores tie, and where letters have no piece, or lose it."""
    lowest = 1 + min(range(len(pieces)), key=list(pieces.values()).__getitem__)
    kept = draw.draw(st.sets(st.integers(0, len(pieces)))) | {0, lowest}
    check_kept_texts(make_unigram(pieces), kept, texts)


def test_the_lowest_score_prices_unknown_characters(make_unigram):
    """Without it 'Xab' would become <unk> and 'ab', although both its pieces are kept."""
    pieces = {"Xa": -20.0, "b": -20.0, "ab": -1.0, "zz": -50.0}
    content = make_unigram(pieces)
    assert check_kept_texts(content, {0, 1, 2, 3, 4}, ["Xab"]) == 1
    with pytest.raises(AssertionError):
        check_kept_texts(content, {0, 1, 2, 3}, ["Xab"])


@pytest.fixture(scope="session")
def make_wordpiece(make_tokenizer):
    def make(tokens: list[str]) -> bytes:
        vocabulary = {token: index for index, token in enumerate(["[UNK]", *tokens])}
        model = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocabulary}
        rest = {"type": "WordPiece", "max_input_chars_per_word": 100}
        return make_tokenizer({**model, **rest})

    return make


@given(
    stems=st.lists(st.text(LETTERS[:3], min_size=2, max_size=4), max_size=20),
    texts=st.lists(WORDS, max_size=30),
    draw=st.data(),
)
def test_a_kept_text_keeps_its_word_pieces(make_wordpiece, stems, texts, draw):
    """Also one of unknown words, as every character of a piece has its own; 'd' has none."""
    singles = [p + letter for letter in LETTERS[:3] for p in ("", "##")]
    longer = [("", "##")[index % 2] + stem for index, stem in enumerate(stems)]
    tokens = list(dict.fromkeys([*singles, *longer]))
    kept = draw.draw(st.sets(st.integers(0, len(tokens)))) | {0}
    check_kept_texts(make_wordpiece(tokens), kept, texts)


def test_an_unknown_word_may_become_known_where_a_character_has_no_piece(make_wordpiece):
    """The one exception that the module names: greedy search ended at 'd' after 'abc'."""
    files = {"tokenizer.json": make_wordpiece(["abc", "ab", "##cd"])}
    assert ids_of(files, ["abcd"]) == [[0]]
    assert ids_of(rewrite(files, [0, 2, 3]), ["abcd"]) == [[1, 2]]


def test_order_type_and_map_of_a_written_file(tokenizer_files, unigram_files):
    trimmed = rewrite(tokenizer_files, [0, 1, 2, 3, 5, 9])
    old = json.loads(tokenizer_files["tokenizer.json"])["model"]["vocab"]
    words = [word for word, index in old.items() if index in (5, 9, 10)]
    assert ids_of(trimmed, [" ".join(words)]) == [[4, 5, 3]]
    trimmed = rewrite(tokenizer_files, [0, 1, 2, 3, 50, 7])
    vocabulary = json.loads(trimmed["tokenizer.json"])["model"]["vocab"]
    assert list(vocabulary.values()) == list(range(6))
    trimmed = rewrite(unigram_files, list(range(6001)))
    before, after = (json.loads(f["tokenizer.json"]) for f in (unigram_files, trimmed))
    assert after == before
    assert len(trimmed["vocab_map.json"]) < 6 * 6001
    content = json.loads(unigram_files["tokenizer.json"])
    del content["model"]["type"]
    files = {"tokenizer.json": json.dumps(content).encode()}
    assert read_tokenizer(files).kind == "Unigram"


TEMPLATE = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 5), ("</s>", 7)]
)
PROCESSORS = {
    "template": TEMPLATE,
    "bert": processors.BertProcessing(("</s>", 7), ("<s>", 5)),
    "roberta": processors.RobertaProcessing(("</s>", 7), ("<s>", 5)),
    "sequence": processors.Sequence([processors.ByteLevel(), TEMPLATE]),
}


@pytest.fixture
def odd_files(make_unigram) -> dict[str, bytes]:
    """Special tokens in the middle of the vocabulary: ``<s>`` 5, ``<pad>`` 6, ``</s>`` 7."""
    names = ["a", "b", "c", "d", "<s>", "<pad>", "</s>", "e"]
    content = json.loads(make_unigram({name: -1.0 - i for i, name in enumerate(names)}))
    unknown, *pieces = content["model"]["vocab"]
    content["model"] |= {"vocab": [*pieces[:3], unknown, *pieces[3:]], "unk_id": 3}
    return {"tokenizer.json": json.dumps(content).encode()}


@pytest.mark.parametrize("name", PROCESSORS)
def test_special_tokens_around_a_text(name, odd_files):
    tokenizer = Tokenizer.from_str(odd_files["tokenizer.json"].decode())
    tokenizer.post_processor = PROCESSORS[name]
    tokenizer.enable_padding(pad_id=6, pad_token="<pad>", length=6)
    tokenizer.enable_truncation(5)
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    assert special_ids(read_tokenizer(files), files) == {3, 5, 6, 7}
    assert tokenizer.encode("a e").ids == [5, 0, 8, 7, 6, 6]
    trimmed = rewrite(files, [0, 3, 5, 6, 7, 8])
    found = Tokenizer.from_str(trimmed["tokenizer.json"].decode())
    assert found.encode("a e").ids == [2, 0, 5, 4, 3, 3]
    assert found.truncation == tokenizer.truncation
    assert found.padding == {**tokenizer.padding, "pad_id": 3}


def test_every_file_that_names_ids(odd_files):
    files = {
        **odd_files,
        "tokenizer_config.json": json.dumps(
            {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "mask_token": None, "x": 5}
            | {"added_tokens_decoder": {"7": {"content": "</s>"}, "11": {"content": "gone"}}}
        ).encode(),
        "special_tokens_map.json": b'{"pad_token": "<pad>", "other": "e"}',
        "added_tokens.json": b'{"</s>": 7, "gone": 11}',
        "vocab.txt": b"old",
        "sentencepiece.bpe.model": b"old",
    }
    assert special_ids(read_tokenizer(files), files) == {3, 5, 6, 7}
    trimmed = rewrite(files, [1, 3, 5, 6, 7])
    assert set(trimmed) == {*files, "vocab_map.json"} - {"sentencepiece.bpe.model"}
    config = json.loads(trimmed["tokenizer_config.json"])
    assert config["added_tokens_decoder"] == {"4": {"content": "</s>"}}
    assert config["x"] == 5
    assert json.loads(trimmed["added_tokens.json"]) == {"</s>": 4}
    assert trimmed["vocab.txt"].decode().splitlines() == ["b", "<unk>", "<s>", "<pad>", "</s>"]
    assert trimmed["special_tokens_map.json"] == files["special_tokens_map.json"]
    assert json.loads(trimmed["vocab_map.json"]) == {"source_size": 9, "old_ids": [1, 3, 5, 6, 7]}
    assert read_vocabulary_map(files) is None
    assert read_vocabulary_map(trimmed).tolist() == [1, 3, 5, 6, 7]
    again = rewrite(trimmed, [1, 2, 3, 4])
    assert json.loads(again["vocab_map.json"]) == {"source_size": 9, "old_ids": [3, 5, 6, 7]}
    trimmed = rewrite(odd_files, [2, 3, 8])
    assert json.loads(trimmed["tokenizer.json"])["model"]["unk_id"] == 1
    assert ids_of(trimmed, ["c", "z"]) == [[0], [1]]
    content = json.loads(odd_files["tokenizer.json"])
    content["model"]["unk_id"] = None
    files = {"tokenizer.json": json.dumps(content).encode()}
    assert special_ids(read_tokenizer(files), files) == set()
    assert json.loads(rewrite(files, [0])["tokenizer.json"])["model"]["unk_id"] is None


@pytest.fixture(scope="module", params=["unigram", "wordpiece"])
def folders(request, tmp_path_factory):
    """A model, the same trimmed, and the map of ids back."""
    base = request.getfixturevalue(request.param)
    ids = [i for row in ids_of(base.tokenizer_files, TEXTS) for i in row]
    counts = np.bincount(ids, minlength=read_tokenizer(base.tokenizer_files).size)
    trimmed = trim_vocabulary(base, choose_vocabulary(base, {"texts": counts}))
    folder = tmp_path_factory.mktemp("trimmed")
    parts = (trimmed.backbone, trimmed.heads, trimmed.shape, trimmed.hf_config)
    write_model_folder(
        folder, *parts, trimmed.tokenizer_files, trimmed.max_seq_length, trimmed.prompts
    )
    return base.name, str(folder), json.loads((folder / "vocab_map.json").read_text())["old_ids"]


def test_transformers_computes_the_same(folders):
    from transformers import AutoModel, AutoTokenizer

    *names, old_ids = folders
    states, ids = [], []
    for name in names:
        tokens = AutoTokenizer.from_pretrained(name)(TEXTS, padding=True, return_tensors="pt")
        with no_loading_bars(), torch.no_grad():
            model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        states.append(model(**tokens).last_hidden_state[tokens["attention_mask"].bool()])
        ids.append(tokens["input_ids"])
    assert ids[0].tolist() == np.array(old_ids)[ids[1]].tolist()
    assert model.config.vocab_size == len(old_ids) < 3000
    torch.testing.assert_close(*states, atol=1e-5, rtol=0)
    files = load_base_model(folders[1]).tokenizer_files
    assert read_vocabulary_map(files).tolist() == folders[2]
    assert "sentencepiece.bpe.model" not in files


def test_a_model_of_another_type_or_with_a_token_twice(make_tokenizer):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    message = (
        r"tokenizer\.json: the model is of type BPE, expected one of Unigram, WordPiece, WordLevel"
        r": the vocabulary of others cannot be trimmed without changing how kept tokens are found"
        r"\. To fix, leave the vocabulary as it is\."
    )
    with pytest.raises(ValueError, match=message):
        read_tokenizer({"tokenizer.json": make_tokenizer(model)})
    message = (
        r"tokenizer\.json: a token or an id occurs twice in the vocabulary\. To fix, copy the "
        r"model's own tokenizer\.json\."
    )
    for model in (
        {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", -1.0], ["a", -2.0]]},
        {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "b": 0}},
    ):
        with pytest.raises(ValueError, match=message):
            read_tokenizer({"tokenizer.json": make_tokenizer(model)})
