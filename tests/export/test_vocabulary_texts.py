"""From texts to a model with fewer tokens, and the report of what that saves and loses."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from bge_pruning.export import vocabulary_texts
from bge_pruning.export.vocabulary import choose_vocabulary, trim_vocabulary
from bge_pruning.export.vocabulary_texts import (
    VocabularyRequest,
    build_report,
    choose_for_texts,
    compare_tokenizers,
    count_tokens,
    find_corpora,
    plain_tokenizer,
    shipped_corpora,
)
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.models.encoder_shape import count_parameters
from bge_pruning.utils.records import Vocabulary


@pytest.fixture(scope="module")
def base(model_folder):
    return load_base_model(str(model_folder))


def trim_to_texts(base, request):
    """The trimmed model, and the report."""
    keep, corpora = choose_for_texts(base, request)
    report = build_report(base.shape, base.tokenizer_files, keep, corpora)
    return trim_vocabulary(base, keep), report


@pytest.fixture
def shipped(tmp_path) -> Path:
    """Corpora of two languages, 'de' and 'xx'."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "news-de.txt").write_text("the man plays\n\nthe dog\n")
    (folder / "news-xx.txt").write_text("the cat eats bread\n")
    (folder / "README.md").write_text("words")
    return folder


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def words_of(base) -> set[str]:
    vocabulary = Tokenizer.from_str(base.tokenizer_files["tokenizer.json"].decode()).get_vocab()
    return set(vocabulary) - {"<s>", "<pad>", "</s>", "<unk>"}


def test_counts_of_a_corpus(base, tmp_path):
    """Without the tokens around a text; long texts are not cut and short ones not padded."""
    path = write(tmp_path / "a.txt", "the man plays\nthe odd dog\n")
    tokenizer = plain_tokenizer(base.tokenizer_files)
    counts = count_tokens(path, tokenizer)
    found = {tokenizer.id_to_token(int(i)): int(counts[i]) for i in np.flatnonzero(counts)}
    assert found == {"the": 2, "man": 1, "plays": 1, "dog": 1, "<unk>": 1}
    assert counts.shape == (len(tokenizer.get_vocab()),)
    tokenizer = Tokenizer.from_str(base.tokenizer_files["tokenizer.json"].decode())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=10)
    files = {**base.tokenizer_files, "tokenizer.json": tokenizer.to_str().encode()}
    cut = plain_tokenizer(files)
    path = write(tmp_path / "a.txt", "the man " * 100 + "\nthe\n")
    counts = count_tokens(path, cut)
    assert counts.sum() == 201 and counts[cut.token_to_id("the")] == 101


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_pieces_of_a_corpus_add_up(base, tmp_path, monkeypatch, chunk):
    path = write(tmp_path / "a.txt", "the man\nthe dog\na cat\nthe end\na man\n")
    expected = count_tokens(path, plain_tokenizer(base.tokenizer_files))
    monkeypatch.setattr(vocabulary_texts, "CHUNK", chunk)
    assert count_tokens(path, plain_tokenizer(base.tokenizer_files)).tolist() == expected.tolist()


@pytest.mark.parametrize("prompt", ["查询：", "Frage:", "query: "])
def test_texts_keep_their_tokens_after_a_prompt(prompt, unigram, tmp_path):
    """After one that does not end with a space, such as that of BGE in Chinese, they begin so."""
    base = replace(unigram, prompts={"prompts": {"query": prompt}, "default_prompt_name": None})
    lines = ["Prime ministers often speak", "Die Regierung spricht", "Question", "the house"]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(lines))
    keep, _ = choose_for_texts(base, VocabularyRequest((str(path),)))
    whole, trimmed = (
        Tokenizer.from_str(model.tokenizer_files["tokenizer.json"].decode())
        for model in (base, trim_vocabulary(base, keep))
    )
    assert len(keep) < 3000  # a prompt in Chinese is no corpus in Chinese
    for line in lines:
        ids = trimmed.encode(prompt + line).ids
        assert keep.old_ids[ids].tolist() == whole.encode(prompt + line).ids


def test_all_kinds_of_files_are_read(base, tmp_path):
    texts = (
        write(tmp_path / "a.csv", "sentence1,score\nthe man,1\n"),
        write(tmp_path / "b.jsonl", '{"query": "a dog", "pos": ["red bread"], "neg": []}\n'),
        write(tmp_path / "c1.txt", "cat\n"),
        str(tmp_path / "c*.txt.gz"),
    )
    (tmp_path / "c2.txt.gz").write_bytes(gzip.compress(b"three horse\n"))
    trimmed, _ = trim_to_texts(base, VocabularyRequest(texts))
    assert words_of(trimmed) == set("the man a dog red bread cat three horse".split())


def test_texts_and_languages_are_put_together(base, shipped, tmp_path):
    texts = (write(tmp_path / "own.txt", "a red flute\n"),)
    trimmed, report = trim_to_texts(base, VocabularyRequest(texts, ("de",), shipped=shipped))
    assert words_of(trimmed) == {"a", "red", "flute", "the", "man", "plays", "dog"}
    roles = [(Path(row["corpus"]).name, row["role"]) for row in report["coverage"]]
    assert roles == [
        ("own.txt", "chosen from"),
        ("news-de.txt", "chosen from"),
        ("news-xx.txt", "other shipped"),
    ]


def test_a_file_is_used_once(shipped, tmp_path, monkeypatch):
    """However it is named, and not called held out if it was not."""
    monkeypatch.chdir(tmp_path)
    texts = ("shipped/news-de.txt", str(shipped / "*-de.txt"))
    request = VocabularyRequest(texts, ("de",), None, (texts[0], "shipped/news-xx.txt"), shipped)
    corpora = find_corpora(request)
    assert corpora.chosen == ("shipped/news-de.txt",)
    assert corpora.held_out == ("shipped/news-xx.txt",)
    assert corpora.other == ()
    dataset = VocabularyRequest(("hf://owner/texts",), shipped=shipped)
    assert find_corpora(dataset).chosen == ("hf://owner/texts",)  # no file


@pytest.mark.parametrize("content", ["", "\n  \n"])
@pytest.mark.parametrize("role", ["texts", "report_on"])
def test_a_corpus_without_text_or_that_is_not_there(base, shipped, tmp_path, content, role):
    path = write(tmp_path / "empty.txt", content)
    request = {"languages": ("de",), "shipped": shipped, role: (path,)}
    message = r"empty\.txt: holds no text\. To fix, choose another file\."
    with pytest.raises(ValueError, match=message):
        trim_to_texts(base, VocabularyRequest(**request))
    # Said before anything is counted.
    gone = VocabularyRequest(**{**request, role: ("gone.txt",)})
    message = rf"gone\.txt: no such file\. To fix, check the path; it is relative to {Path.cwd()}\."
    with pytest.raises(FileNotFoundError, match=message):
        find_corpora(gone)


def test_what_cannot_be_trimmed_is_said_before_texts_are_read(base, shipped, monkeypatch):
    monkeypatch.setattr(vocabulary_texts, "count_tokens", lambda *_: pytest.fail("reads"))
    with pytest.raises(ValueError, match=r"vocabulary_size 1000 is above the \d+ tokens"):
        trim_to_texts(base, VocabularyRequest((), ("de",), 1000, shipped=shipped))


@pytest.fixture
def report(base, shipped, tmp_path):
    held_out = write(tmp_path / "held.txt", "the man\nthe man sings\nodd words the\n")
    request = VocabularyRequest((), ("de",), None, (held_out,), shipped)
    return trim_to_texts(base, request)


def test_what_is_saved_and_what_is_kept_of_each_corpus(base, report):
    trimmed, content = report
    assert content["vocabulary"] == {"source": 99, "kept": 8, "required": 4, "rows_saved": 91}
    before, after = count_parameters(base.shape).total, count_parameters(trimmed.shape).total
    saved = {"saved": 91 * 32, "share_saved": 91 * 32 / before}
    assert content["parameters"] == pytest.approx({"source": before, "trimmed": after, **saved})
    assert content["scripts"] == ["LATIN"]
    assert json.loads(json.dumps(content)) == content
    assert Vocabulary(**content).as_dict() == content
    chosen, held_out, other = content["coverage"]
    assert chosen["role"] == "chosen from"
    assert (chosen["texts"], chosen["tokens"]) == (2, 5)
    assert chosen["tokens_kept"] == chosen["texts_same"] == chosen["growth"] == 1.0
    # 'sings' is lost; <unk> stays what it was.
    assert (held_out["texts"], held_out["tokens"]) == (3, 8)
    assert (held_out["tokens_kept"], held_out["texts_same"]) == (7 / 8, 2 / 3)
    assert (held_out["unknown_before"], held_out["unknown_after"]) == (2 / 8, 3 / 8)
    assert other["tokens_kept"] == 1 / 4 and other["texts_same"] == 0.0


def test_only_the_first_texts_of_a_large_corpus_are_reported(base, shipped):
    corpora = find_corpora(VocabularyRequest((), ("de",), shipped=shipped))
    tokenizer = plain_tokenizer(base.tokenizer_files)
    counts = {path: count_tokens(path, tokenizer) for path in corpora.chosen}
    keep = choose_vocabulary(base, counts)
    content = build_report(base.shape, base.tokenizer_files, keep, corpora, limit=1)
    assert content["coverage"][0]["texts"] == 1
    assert content["vocabulary"]["kept"] == 8


def test_longer_texts_and_pieces_in_another_order():
    """'abc' becomes two pieces; 'cab' has as many as before, but others."""
    pieces = {"<unk>": 0, "a": 1, "##b": 2, "##c": 3, "ab": 4, "c": 5, "##ab": 6, "##a": 7}

    def tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
        model = models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix="##")
        made = Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return made

    kept = ["<unk>", "a", "##b", "##c", "c", "##a"]
    old_ids = np.array([pieces[piece] for piece in kept])
    after = tokenizer({piece: index for index, piece in enumerate(kept)})
    texts = [["abc", "a"], ["cab c", "z"]]
    found = compare_tokenizers(texts, tokenizer(pieces), after, old_ids, 0)
    # The untrimmed one reads "ab ##c", "a", "c ##ab c" and an unknown word.
    assert (found["texts"], found["tokens"]) == (4, 7)
    assert found["tokens_kept"] == 5 / 7
    assert found["texts_same"] == 2 / 4
    assert found["growth"] == 9 / 7
    assert (found["unknown_before"], found["unknown_after"]) == (1 / 7, 1 / 9)
    assert compare_tokenizers(texts, after, after, np.arange(6), None)["unknown_after"] == 0.0


def test_what_is_said_of_the_texts(base, tmp_path, messages, shipped):
    messages.set_level("INFO", "bge_pruning")
    path = write(tmp_path / "few.txt", "the man\nthe dog\n")
    trim_to_texts(base, VocabularyRequest((path,)))
    assert (
        "few.txt: 50.0 % of its 4 tokens occur once, so about that share of the tokens of other "
        "texts of its kind is not among them. Use more texts" in messages.text
    )
    messages.clear()
    smaller = write(tmp_path / "fewer.txt", "a cat\n")
    trim_to_texts(base, VocabularyRequest((path, smaller)))
    (said,) = [r.getMessage() for r in messages.records if r.levelname == "WARNING"]
    assert "fewer.txt: 100.0 %" in said and " (and a smaller share in 1 more). Use" in said
    messages.clear()
    path = write(tmp_path / "many.txt", "the man\nthe dog\n" * 2)
    trim_to_texts(base, VocabularyRequest((path,)))
    assert not messages.records
    tokens = plain_tokenizer(base.tokenizer_files).get_vocab()
    path = write(tmp_path / "all.txt", "\n".join([" ".join(tokens)] * 2))
    trimmed, _ = trim_to_texts(base, VocabularyRequest((path,)))
    assert trimmed.shape.vocab_size == len(tokens)
    assert f"all {len(tokens)} tokens are kept: the texts need every one" in messages.text
    _, report = trim_to_texts(base, VocabularyRequest((), ("de",), 20, shipped=shipped))
    assert report["vocabulary"]["kept"] == 8
    assert "8 tokens are kept, not 20: the texts have no more" in messages.text
    _, report = trim_to_texts(base, VocabularyRequest((), ("de",), 5, shipped=shipped))
    assert report["vocabulary"]["kept"] == 5


def test_no_texts_or_a_language_without_a_corpus(shipped):
    languages = "ar de en es fi fr hi id it ja ko nl pl pt ru sw th tr uk vi zh"
    assert list(shipped_corpora()) == languages.split()
    assert all(Path(path).is_file() for path in shipped_corpora().values())
    message = (
        r"no texts say which tokens to keep\. To fix, pass --keep-vocabulary-from FILES or "
        r"--languages\."
    )
    with pytest.raises(ValueError, match=message):
        find_corpora(VocabularyRequest())
    for folder, listed in (("shipped", "de, xx"), ("nothing", "none")):
        request = VocabularyRequest(languages=("it", "tr"), shipped=shipped.parent / folder)
        message = (
            rf"no corpus of it, tr is shipped, only of {listed}\. To fix, pass "
            r"--keep-vocabulary-from with texts of that language\."
        )
        with pytest.raises(ValueError, match=message):
            find_corpora(request)
