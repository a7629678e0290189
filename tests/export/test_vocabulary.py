"""Fewer tokens: kept texts keep tokens and vectors, and others do not become unknown."""

import copy
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bge_pruning.export.vocabulary import (
    KeptVocabulary,
    choose_vocabulary,
    script_of,
    trim_vocabulary,
)
from bge_pruning.export.vocabulary_files import read_tokenizer, rewrite_tokenizer_files
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.models.encoder_shape import count_parameters
from bge_pruning.models.structural_pruning import KeepIndices
from bge_pruning.utils.records import PruningRecord

ROOT = Path(__file__).parents[2]
LANGUAGES = ("ar", "de", "en", "fr", "hi", "ja", "sw", "zh")


def sentences(language: str) -> list[str]:
    path = ROOT / "data" / "sentences" / f"newstest2019-{language}.txt.gz"
    return gzip.decompress(path.read_bytes()).decode().splitlines()[:400]


def tokenizer_of(files) -> Tokenizer:
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def ids_of(files, texts: list[str]) -> list[list[int]]:
    encodings = tokenizer_of(files).encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def count(base, texts: list[str]) -> np.ndarray:
    ids = [i for row in ids_of(base.tokenizer_files, texts) for i in row]
    return np.bincount(ids, minlength=read_tokenizer(base.tokenizer_files).size)


def choose(base, languages: str, size: int | None = None) -> KeptVocabulary:
    counts = {name: count(base, sentences(name)) for name in languages.split()}
    return choose_vocabulary(base, counts, size)


@pytest.fixture(params=["unigram", "wordpiece"])
def base(request):
    return request.getfixturevalue(request.param)


def test_which_pieces_are_needed_by_others(unigram, wordpiece):
    """Every character of the small real model has a piece, so unknown words are kept too."""
    vocabulary = json.loads(unigram.tokenizer_files["tokenizer.json"])["model"]["vocab"]
    keep = choose_vocabulary(unigram, {"none": np.zeros(6001, np.int64)})
    lowest = min(score for _, score in vocabulary)
    assert lowest in {vocabulary[old][1] for old in keep.old_ids}
    assert len(keep) == keep.required < 300
    tokens = set(tokenizer_of(wordpiece.tokenizer_files).get_vocab())
    for token in tokens:
        if not token.startswith("["):
            stem = token.removeprefix("##") or token
            assert stem[0] in tokens
            assert all(f"##{c}" in tokens for c in stem)


@pytest.mark.parametrize("languages", ["en", "de fr", "ja zh", "hi"])
def test_kept_real_texts_keep_their_tokens(base, languages):
    keep = choose(base, languages)
    trimmed = trim_vocabulary(base, keep)
    kept, same = set(keep.old_ids.tolist()), 0
    for language in LANGUAGES:
        texts = sentences(language)
        texts += [word for text in texts[:100] for word in text.split()]
        before = ids_of(base.tokenizer_files, texts)
        after = ids_of(trimmed.tokenizer_files, texts)
        for old, new in zip(before, after, strict=True):
            if set(old) <= kept:
                assert keep.old_ids[new].tolist() == old
                same += language not in languages
            else:
                assert language not in languages
                assert keep.old_ids[new].tolist() != old
    assert same > 100


def outputs_of(base, texts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer = tokenizer_of(base.tokenizer_files)
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(pad_id=base.hf_config["pad_token_id"])
    encodings = tokenizer.encode_batch(texts)
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    with torch.no_grad():
        return base.heads.outputs(base.backbone.eval()(ids, mask), mask)


def test_outputs_sizes_and_config_of_the_trimmed_model(base, assert_same):
    keep = choose(base, "de en zh")
    texts = [t for language in ("de", "en", "zh") for t in sentences(language)[:12]]
    expected = outputs_of(base, texts)
    found = outputs_of(trim_vocabulary(base, keep), texts)
    assert set(found) == {"dense_vecs", "token_weights", "colbert_vecs"}
    assert_same(found, expected)
    trimmed = trim_vocabulary(base, choose(base, "en", 1200))
    counted = trimmed.backbone.count_parameters()
    expected = count_parameters(trimmed.shape)
    assert (counted.encoder, counted.embeddings) == (expected.encoder, expected.embeddings)
    assert trimmed.shape == replace(base.shape, vocab_size=1200) == trimmed.backbone.shape
    assert trimmed.hf_config["vocab_size"] == 1200
    assert trimmed.backbone.embeddings.word_embeddings.num_embeddings == 1200
    vocabulary = tokenizer_of(trimmed.tokenizer_files).get_vocab()
    old = tokenizer_of(base.tokenizer_files).get_vocab()
    tokens = {index: token for token, index in old.items()}
    assert sorted(vocabulary.values()) == list(range(1200))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert vocabulary[tokens[base.hf_config[key]]] == trimmed.hf_config[key]


def test_prompts_keep_their_tokens(base):
    """They are in front of every text, and were cut into single characters."""
    prompts = {"query": "Represent this question: ", "document": "Künftige Dokumente: ", "": ""}
    base = replace(base, prompts={"prompts": prompts, "default_prompt_name": None})
    keep = choose(base, "zh", 2000)
    texts = [prompt.strip() for prompt in prompts.values()]
    found = ids_of(trim_vocabulary(base, keep).tokenizer_files, texts)
    expected = ids_of(base.tokenizer_files, texts)
    assert [keep.old_ids[ids].tolist() for ids in found] == expected


def test_only_the_rows_change(unigram):
    before = {name: p.clone() for name, p in unigram.backbone.state_dict().items()}
    keep = choose(unigram, "en", 2000)
    unigram = replace(unigram, projection=torch.eye(40, 32))
    trimmed = trim_vocabulary(unigram, keep)
    assert trimmed.projection is unigram.projection
    name = "embeddings.word_embeddings.weight"
    for key, tensor in trimmed.backbone.state_dict().items():
        if key == name:
            assert torch.equal(tensor, before[key][keep.old_ids])
        else:
            assert tensor.data_ptr() == unigram.backbone.state_dict()[key].data_ptr()
        assert torch.equal(unigram.backbone.state_dict()[key], before[key])
    assert trimmed.heads is unigram.heads
    assert trimmed.backbone.embeddings.word_embeddings.weight.requires_grad
    assert unigram.shape.vocab_size == unigram.hf_config["vocab_size"] == 6001
    assert "sentencepiece.bpe.model" in unigram.tokenizer_files


def test_a_cut_or_trimmed_model_can_be_trimmed(unigram, target_shape, assert_same):
    backbone, heads = copy.deepcopy(unigram.backbone), copy.deepcopy(unigram.heads)
    cut = KeepIndices([0, 2], [*range(0, 32, 2)], [[0, 3], [1, 2]], [[*range(32)]] * 2)
    backbone.prune(cut)
    heads.prune(cut.hidden)
    shape = replace(target_shape, vocab_size=6001, max_position_embeddings=514)
    base = replace(unigram, shape=shape, backbone=backbone, heads=heads)
    trimmed = trim_vocabulary(base, choose(base, "en"))
    assert_same(outputs_of(trimmed, sentences("en")[:8]), outputs_of(base, sentences("en")[:8]))
    counted = trimmed.backbone.count_parameters()
    assert counted.embeddings == count_parameters(trimmed.shape).embeddings
    assert trimmed.shape == replace(shape, vocab_size=trimmed.hf_config["vocab_size"])
    first = trim_vocabulary(unigram, choose(unigram, "de en fr"))
    second = trim_vocabulary(first, choose(first, "en", 1200))
    once = trim_vocabulary(unigram, choose(unigram, "en", 1200))
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(second.backbone.state_dict()[name], once.backbone.state_dict()[name])
    assert second.tokenizer_files == once.tokenizer_files
    assert json.loads(second.tokenizer_files["vocab_map.json"])["source_size"] == 6001


def test_the_record_of_an_extracted_model_has_the_new_sizes(unigram):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}
    counts = {"encoder": 1, "total": 3}
    earlier = PruningRecord(
        source={"base_model": "a"},
        source_shape=sizes,
        shape={**sizes, "vocab_size": 6001},
        parameters={"source": counts, "extracted": counts},
        kept={},
        constraint={},
    )
    trimmed = trim_vocabulary(replace(unigram, pruning=earlier), choose(unigram, "en", 1200))
    record = trimmed.pruning.as_dict()
    assert record["shape"] == {**sizes, "vocab_size": 1200}
    assert record["parameters"]["source"] == counts
    assert record["parameters"]["extracted"] == count_parameters(trimmed.shape).as_dict()
    assert earlier.shape.vocab_size == 6001


def test_where_tokens_are_put_and_rows_without_one_are_dropped(unigram, wordpiece, model_folder):
    """Of whole words none is needed by others."""
    keep = choose(unigram, "en", 1200)
    assert keep.old_ids[:4].tolist() == [0, 1, 2, 3]
    assert keep.old_ids[-1] == 6000
    assert (np.diff(keep.old_ids) > 0).all()
    keep = choose(wordpiece, "en", 600)
    assert keep.old_ids[[0, 100, 101, 102, 103]].tolist() == [0, 100, 101, 102, 103]
    assert (np.diff(np.delete(keep.old_ids, [0, 100, 101, 102, 103])) > 0).all()
    tokenizer = tokenizer_of(unigram.tokenizer_files)
    tokenizer.add_tokens(["[query]", "[passage]"])
    files = {**unigram.tokenizer_files, "tokenizer.json": tokenizer.to_str().encode()}
    base = replace(unigram, tokenizer_files=files, shape=replace(unigram.shape, vocab_size=6003))
    keep = choose(base, "en", 1200)
    assert keep.old_ids[-3:].tolist() == [6000, 6001, 6002]
    trimmed = rewrite_tokenizer_files(read_tokenizer(files), files, keep.old_ids)
    found = tokenizer_of(trimmed).get_vocab()
    assert (found["<mask>"], found["[query]"], found["[passage]"]) == (1197, 1198, 1199)
    base = load_base_model(str(model_folder))
    tokens = read_tokenizer(base.tokenizer_files).size
    keep = choose_vocabulary(base, {"all": np.ones(tokens, np.int64)})
    assert base.shape.vocab_size == 99
    assert trim_vocabulary(base, keep).shape.vocab_size == tokens < 99
    assert keep.required == 4


def test_the_most_frequent_tokens_are_kept(unigram):
    tokens = read_tokenizer(unigram.tokenizer_files).tokens
    words = [i for i, t in tokens.items() if t[0] == "▁" and t[1:].isascii() and len(t) > 4][:4]
    second, third, fourth = words[1:]
    counts = {"one": np.zeros(6001, np.int64), "two": np.zeros(6001, np.int64)}
    counts["one"][words] = 3, 1, 5, 4
    counts["two"][[second, fourth]] = 4, 1  # 3, 5, 5 and 5 in all
    required = choose_vocabulary(unigram, counts).required

    def chosen(size: int | None) -> set[int]:
        return set(choose_vocabulary(unigram, counts, size).old_ids.tolist()) & set(words)

    assert chosen(required) == set()
    assert chosen(required + 1) == {second}  # of equally frequent ones the first
    assert chosen(required + 2) == {second, third}
    assert chosen(required + 3) == {second, third, fourth}
    for size in (required + 4, required + 50, None):
        keep = choose_vocabulary(unigram, counts, size)
        assert len(keep) == required + 4 and set(words) <= set(keep.old_ids.tolist())


def test_kept_scripts_are_those_that_the_texts_are_written_in(unigram):
    """At least in one corpus: Hindi is 0.3 % of all letters of the last."""
    found = [script_of(c) for c in "aßж漢あー한"]
    assert found == "LATIN LATIN CYRILLIC CJK HIRAGANA KATAKANA HANGUL".split()
    assert {script_of(c) for c in "1١,.▁€\u0301#🙂"} == {"common"}
    counts = {"en": 300 * count(unigram, sentences("en")), "hi": count(unigram, sentences("hi"))}
    assert "DEVANAGARI" in choose_vocabulary(unigram, counts).scripts
    for languages, scripts in (("en", "LATIN"), ("zh", "CJK LATIN"), ("hi de", "DEVANAGARI LATIN")):
        assert choose(unigram, languages).scripts == tuple(scripts.split())


@pytest.mark.parametrize("language", ["de", "en", "fr", "sw"])
def test_texts_of_kept_scripts_do_not_become_unknown(base, language):
    """Even with no other token than the required ones."""
    keep = choose(base, "de", choose(base, "de").required)
    assert len(keep) == keep.required and keep.scripts == ("LATIN",)
    trimmed = trim_vocabulary(base, keep).tokenizer_files
    unknown = [read_tokenizer(files).unknown for files in (base.tokenizer_files, trimmed)]
    texts = [t for t in sentences(language) if {script_of(c) for c in t} <= {"common", "LATIN"}]
    rows = zip(ids_of(base.tokenizer_files, texts), ids_of(trimmed, texts), strict=True)
    assert all(unknown[0] in old or unknown[1] not in new for old, new in rows)
    assert len(texts) > 300
    assert all(unknown[1] in row for row in ids_of(trimmed, sentences("ar")[:20]))


def test_byte_pieces_are_kept(bare, make_unigram):
    pieces = {"<0x41>": -8.0, "<0xFF>": -9.0, "ab": -1.0, "<0xZ>": -2.0}
    content = json.loads(make_unigram(pieces))
    for fallback, needed in ((True, [0, 1, 2]), (False, [0, 2])):
        content["model"]["byte_fallback"] = fallback
        base = bare(json.dumps(content).encode())
        assert choose_vocabulary(base, {"none": np.zeros(5, np.int64)}).old_ids.tolist() == needed


@pytest.fixture
def bare(unigram):
    """A function that gives the tiny model another ``tokenizer.json`` and config."""

    def make(content: bytes, rows: int = 6001, **config):
        return replace(
            unigram,
            shape=replace(unigram.shape, vocab_size=rows),
            tokenizer_files={"tokenizer.json": content},
            hf_config={"pad_token_id": 0, **config},
        )

    return make


def test_a_size_or_a_choice_that_does_not_fit(unigram, wordpiece):
    required = choose(unigram, "en").required
    message = (
        rf"vocabulary_size {required - 1} is below the {required} tokens that must stay: special "
        rf"tokens, those of the model's prompts, and the characters of the texts' scripts\. To "
        rf"fix, choose {required} or more\."
    )
    with pytest.raises(ValueError, match=message):
        choose(unigram, "en", required - 1)
    message = (
        r"vocabulary_size 6002 is above the 6001 tokens of the model\. To fix, choose fewer, or "
        r"leave it out to keep every token of the texts\."
    )
    with pytest.raises(ValueError, match=message):
        choose(unigram, "en", 6002)
    keep = choose_vocabulary(unigram, {"all": np.ones(6001, np.int64)}, 6001)
    assert keep.old_ids.tolist() == list(range(6001))
    message = (
        rf"the tokens to keep were chosen from another tokenizer than that of {wordpiece.name}\. "
        r"To fix, choose them from this model\."
    )
    with pytest.raises(ValueError, match=message):
        trim_vocabulary(wordpiece, choose(unigram, "en"))


def test_ids_that_the_rows_or_the_config_do_not_fit(bare, make_unigram):
    base = bare(make_unigram({"a": -1.0, "b": -2.0}), rows=2)
    message = (
        r"tokenizer\.json has 3 tokens but the embeddings have 2 rows\. To fix, use the tokenizer "
        r"and the weights of the same model\."
    )
    with pytest.raises(ValueError, match=message):
        choose_vocabulary(base, {"none": np.zeros(3, np.int64)})
    digest = read_tokenizer(base.tokenizer_files).digest
    with pytest.raises(ValueError, match=message):
        trim_vocabulary(base, KeptVocabulary(np.arange(3), 3, (), digest))
    base = bare(make_unigram({"a": -1.0}), eos_token_id=7)
    message = (
        r"config\.json: eos_token_id is 7, but tokenizer\.json has no token of that id\. To fix, "
        r"correct the id, or set it to null if the model has no such token\."
    )
    with pytest.raises(ValueError, match=message):
        choose_vocabulary(base, {"none": np.zeros(2, np.int64)})
    base = bare(make_unigram({"a": -1.0}), eos_token_id=None)
    assert len(choose_vocabulary(base, {"none": np.zeros(2, np.int64)})) == 2
    base = bare(make_unigram({f"{c}{c}": -1.0 for c in "abcdef"}), pad_token_id=6)
    message = (
        r"pad_token_id 6 would become 2, and positions are counted from it, so every vector would "
        r"change\. To fix, keep 7 tokens or more, or leave the vocabulary as it is\."
    )
    with pytest.raises(ValueError, match=message):
        choose_vocabulary(base, {"none": np.zeros(7, np.int64)})
