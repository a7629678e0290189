"""Reading scored pairs and plain sentences, and what is said about files that are wrong."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bge_pruning.config.data_parts import PassagesConfig
from bge_pruning.datasets import text_files
from bge_pruning.datasets.embedding_dataset import build_tokenizer
from bge_pruning.datasets.rows import BadRows, Row
from bge_pruning.datasets.sts_dataloader import (
    STSPairs,
    build_cutter,
    cut_article,
    read_pairs,
    read_sentences,
    read_sts,
    read_texts,
)
from bge_pruning.datasets.tables import Table

ROOT = Path(__file__).parents[2]
PAIRS = STSPairs(["A cat.", "Ein Hund läuft."], ["The cat.", "狗在跑。"], [5.0, 3.25])


@pytest.fixture
def write_pairs(write) -> Callable[[str | bytes], Path]:
    return lambda content: write(content, "pairs.csv")


HEADER, LINES = "sentence1,sentence2,score\n", "A cat.,The cat.,5\nEin Hund läuft.,狗在跑。,3.25\n"
OTHER = "3.25,,狗在跑。,Ein Hund läuft.\n"
OTHER = "3.25,,狗在跑。,Ein Hund läuft.\n"
JSON = """
{"sentence1": "A cat.", "sentence2": "The cat.", "score": 5, "id": 1}\n
{"score": "3.25", "sentence1": "Ein Hund läuft.", "sentence2": "狗在跑。"}
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", LINES),
        ("a.csv", (HEADER + LINES).rstrip()),
        ("a.csv", "score,id,sentence2,sentence1\n5,x,The cat.,A cat.\n" + OTHER),
        ("a.csv", '"A cat.","The cat.","5"\r\n\r\nEin Hund läuft.,狗在跑。,3.25\r\n'),
        ("a.csv", "\ufeff" + HEADER + LINES),
        ("a.csv", "\ufeff" + LINES),
        ("a.tsv", LINES.replace(",", "\t")),
        ("a.tsv", (HEADER + LINES).replace(",", "\t")),
        ("a.jsonl", JSON),
    ],
)
def test_formats(name, content, write):
    assert read_sts(write(content, name)) == PAIRS


def test_quotes_delimiters_and_line_breaks_inside_a_text(write_pairs):
    pairs = read_sts(write_pairs('"He said ""no"", twice","one\ntwo, three",1\nb,c,2\n'))
    assert pairs.sentences1 == ['He said "no", twice', "b"]
    assert pairs.sentences2 == ["one\ntwo, three", "c"]
    assert len(pairs) == 2
    assert read_sts(write_pairs("score,value,1\n")).sentences1 == ["score"]  # not a header


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_a_line(mark, write):
    assert read_sts(write(f"a{mark}b,c,1\n", "a.csv")).sentences1 == [f"a{mark}b"]
    text = f'{{"sentence1": "a{mark}b", "sentence2": "c", "score": 1}}\n'
    if mark >= " ":  # JSON allows no control characters
        assert read_sts(write(text, "a.jsonl")).sentences1 == [f"a{mark}b"]


def test_scores_at_the_edges(write_pairs):
    lines = [f"a,b,{score}\n" for score in ("0", "5", "5.0", "2.5e0", " 1")]
    assert read_sts(write_pairs("".join(lines))).scores == [0.0, 5.0, 5.0, 2.5, 1.0]


FIX = " To fix, correct or remove the line"
NO_HEADER = "has {} columns and no header, expected sentence1, sentence2, score"
NO_SCORE = "names no column sentence1, and without a header the last column is a score,"
GERMAN = (
    "If it is a header (Satz1, Satz2, Wertung), add columns: {sentence1: Satz1, sentence2: Satz2, "
    "score: Wertung} to the source."
)
ODD = '{"sentence1": "a", "sentence2": 7, "score": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b,1\nc,d,n/a\n", ":2: score 'n/a' is not a number in [0, 5]." + FIX),
        ("a.csv", "a,b,1\nc,d,nan\n", ":2: score 'nan' is not a number in [0, 5]." + FIX),
        ("a.csv", "a,b,1\n\nc,d,5.01\n", ":3: score '5.01' is not a number in [0, 5]."),
        ("a.csv", "a,b,-0.1\n", ":1: score '-0.1' is not a number in [0, 5]."),
        ("a.csv", "a,b,inf\n", ":1: score 'inf' is not a number in [0, 5]."),
        ("a.csv", "a,b,\n", ":1: score '' is not a number in [0, 5]."),
        ("a.csv", '"a\nb",c,1\nd,e,x\n', ":3: score 'x' is not a number in [0, 5]."),
        ("a.csv", "a,b,1\nc,,2\n", ":2: sentence2 is empty or no text." + FIX),
        ("a.csv", "  ,b,1\n", ":1: sentence1 is empty or no text." + FIX),
        ("a.csv", "a,b,1\nc,d\n", ":2: has 2 columns, expected 3 as in the first line. To fix"),
        ("a.csv", "a,b\n", ":1: has 2 columns and no header, expected sentence1, sentence2, score"),
        ("a.csv", "a\tb\t1\n", f":1: {NO_HEADER.format(1)}. It has tabs: is it a .tsv file? To"),
        ("a.csv", "sentence1,score\na,1\n", ":1: the header lacks sentence2. To fix, rename"),
        ("a.csv", "Satz1,Satz2,Wertung\n", f":1: {NO_SCORE} not 'Wertung'.{FIX}. {GERMAN}"),
        ("a.tsv", "Satz1\tSatz2\tWertung\n", f":1: {NO_SCORE} not 'Wertung'.{FIX}. {GERMAN}"),
        ("a.csv", "Sentence1,Sentence2,Score\n", f":1: {NO_SCORE} not 'Score'"),
        (
            "a.csv",
            'nr,"a: b",c,d\n1,2,3,4\n',
            f":1: {NO_HEADER.format(4)}. To fix, correct the line or add a header that names those "
            'columns. If it is a header (nr, "a: b", c, d), add columns: {sentence1: ..., ',
        ),
        ("a.tsv", "a\tb\t1\na\tb\tn/a\n", ":2: score 'n/a' is not a number in [0, 5]."),
        ("a.tsv", "a\tb\tc\t1\n", ":1: has 4 columns and no header, expected sentence1, "),
        ("a.tsv", "a\tb\t1\na\tb\tc\t1\n", ":2: has 4 columns, expected 3 as in the first line."),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b"}\n', ":1: lacks score, it has 'sent"),
        ("a.jsonl", "[1]\n", ":1: lacks sentence1, sentence2, score."),
        ("a.jsonl", '\n{"sentence1": \n', ":2: is not JSON (Expecting value)." + FIX),
        ("a.jsonl", ODD, ":1: sentence2 is empty or no text."),
        ("a.jsonl", ODD.replace("7", '"b"').replace("1}", "null}"), ":1: score 'None' is not a"),
        ("a.csv", "", ": holds no sentence pairs. To fix, choose another file."),
        ("a.csv", "sentence1,sentence2,score\n", ": holds no sentence pairs."),
        ("a.jsonl", "\n", ": holds no sentence pairs."),
        ("a.xlsx", "x", ": file type '.xlsx' is not one of .csv, .jsonl, .parquet, .tsv. To fix"),
        ("a.csv", b"a,b,1\nc,\xff,1\n", ":2: sentence2 is not UTF-8, or holds half of a surrogate"),
        ("a.jsonl", "a\n".encode("utf-16"), ":1: is not UTF-8. To fix, convert the file."),
    ],
)
def test_errors_name_file_and_line(name, content, message, write):
    path = write(content, name)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path) + message)}"):
        read_sts(path)


LONG = "word " * 40_000


def test_cells_of_any_length(write):
    """The csv module alone stops at 131,072 characters."""
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        path = write(f"{mark.join((LONG, 'b', '1'))}\nc{mark}d{mark}2\n", name)
        assert read_sts(path) == STSPairs([LONG, "c"], ["b", "d"], [1.0, 2.0])
    assert texts_of(write(f"id,text\n1,{LONG}\n", "b.csv")) == [LONG]


OPEN = (
    ". To fix, look for a quote left open in the row that begins in line {}; inside of a quoted "
    "cell a quote is written twice."
)
CLOSED = ":2: text follows a closing quote" + OPEN.format(2)


@pytest.mark.parametrize(
    ("content", "message", "left"),
    [
        # Which rows a quote left open takes in is not known: also where others are skipped.
        (
            'a,b,1\n"c,d,2\ne,f,3\n',
            ":3: the file ends inside of a quoted cell" + OPEN.format(2),
            None,
        ),
        ('a,b,1\n"c,d,2\n"e" f,g,3\n', ":3: text follows a closing quote" + OPEN.format(2), None),
        ('a,b,1\n"c" d,e,2\nf,g,3\n', CLOSED, ["a", "f"]),
        ('a,b,1\n"It is over," he said.,e,2\nf,g,3\n', CLOSED, ["a", "f"]),
        (
            f"a,b,1\n{'c' * 200},d,2\nf,g,3\n",
            ":2: a cell has more than 100 characters" + OPEN.format(2),
            ["a", "f"],
        ),
    ],
    ids=["open to the end", "open", "a quote inside", "a quotation", "long"],
)
def test_a_damaged_row_is_named_and_can_be_skipped_alone(
    content, message, left, write_pairs, monkeypatch
):
    monkeypatch.setattr(text_files, "LARGEST_CELL", 100)
    limit = csv.field_size_limit(100)
    try:
        path = write_pairs(content)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path) + message)}$"):
            read_sts(path)
        bad = BadRows(skip=True)
        if left is None:
            with pytest.raises(ValueError, match="left open in the row that begins in line 2"):
                list(read_pairs(Table(str(path)), bad=bad))
        else:
            assert [row.text for row in read_pairs(Table(str(path)), bad=bad)] == left
            assert bad.examples == [str(path) + message]
    finally:
        csv.field_size_limit(limit)


QUOTATION = '"It is over," he said.'


def test_quotes_are_text_in_a_tsv(write, caplog):
    path = write(f'{QUOTATION}\t"Quoted."\t1\n"One open\tb\t2\nfirst ""\tc "" d\t3\n', "a.tsv")
    assert read_sts(path).sentences1 == [QUOTATION, '"One open', 'first ""']
    assert read_sts(path).sentences2 == ['"Quoted."', "b", 'c "" d']
    assert texts_of(path)[:2] == [QUOTATION, '"Quoted."']
    assert not caplog.messages
    # A cell as CSV writes it stays as it is, and once it is said.
    path = write('"He said ""no""."\tb\t1\n"c "" d"\te\t2\n', "b.tsv")
    assert read_sts(path) == read_sts(path)
    assert read_sts(path).sentences1[0] == '"He said ""no""."'
    (message,) = caplog.messages
    assert message.startswith(f"{path}:1: a cell looks quoted as in CSV, but quotes are text in a ")


def test_a_header_in_other_words_is_not_a_row_to_skip(write):
    path = write("Wertung,Satz1,Satz2\n5,a,b\n", "a.csv")
    with pytest.raises(ValueError, match=r"If it is a header \(Wertung, Satz1, Satz2\), add col"):
        list(read_pairs(Table(str(path)), bad=BadRows(skip=True)))
    columns = {"score": "Wertung", "sentence1": "Satz1", "sentence2": "Satz2"}
    assert [row.text for row in read_pairs(Table(str(path), columns))] == ["a"]
    with pytest.raises(ValueError, match=r"jahr.*\(nr, titel, jahr\), add columns: {text: ...} to"):
        texts_of(write("nr,titel,jahr\n1,a,2020\n", "b.csv"))


def test_no_file(tmp_path):
    path = tmp_path / "pairs.csv"
    with pytest.raises(FileNotFoundError, match=r"no.csv: no such file. To fix, check the path"):
        read_sts(path.with_name("no.csv"))


@pytest.mark.parametrize(("split", "rows"), [("train", 5749), ("dev", 1500), ("test", 1379)])
def test_shipped_data(split, rows):
    pairs = read_sts(ROOT / f"data/sts/stsb-en-{split}.csv")
    assert len(pairs) == len(pairs.sentences1) == len(pairs.sentences2) == rows


def test_another_score_range(write_pairs):
    table = Table(str(write_pairs("a,b,-1\nc,d,1\n")))
    assert [row.scores for row in read_pairs(table, (-1.0, 1.0))] == [(-1.0,), (1.0,)]
    message = r"csv:1: score '-1' is not a number in \[0, 1\].*score_range"
    with pytest.raises(ValueError, match=message):
        list(read_pairs(table, (0.0, 1.0)))


def test_wrong_rows_are_skipped_and_counted(write_pairs):
    content = b"a,b,1\nc,,1\nd,e\nf,\xff,2\ng,h,9\ni,j,2\n"
    bad = BadRows(skip=True)
    rows = list(read_pairs(Table(str(write_pairs(content))), bad=bad))
    assert [row.text for row in rows] == ["a", "i"]
    assert bad.count == 4
    assert [re.search(r"csv:(\d)", example)[1] for example in bad.examples] == ["2", "3", "4", "5"]


def texts_of(path: Path, **columns: str) -> list[str]:
    return [row.text for row in read_sentences(Table(str(path), columns))]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_sentences_of_a_text_file(name, write):
    path = write("one\n\n two \none\nthree, with a comma\n", name)
    assert texts_of(path) == ["one", "two", "one", "three, with a comma"]


def test_sentences_of_tables(write):
    assert texts_of(write("a,b,1\nb,c,2\n", "a.csv")) == ["a", "b", "b", "c"]
    assert texts_of(write("id,text\n1,a\n2,b\n", "a.csv")) == ["a", "b"]
    assert texts_of(write("id,titel\n1,a\n2,b\n", "a.csv"), text="titel") == ["a", "b"]
    row = '{"query": "q", "pos": ["p"], "neg": ["n", "m"]}\n'
    assert texts_of(write(row, "a.jsonl")) == ["q", "p", "n", "m"]


def test_no_sentences(write):
    assert texts_of(write("\n \n", "a.txt")) == []
    with pytest.raises(ValueError, match=r"file type '.md' .*, may be in a \.txt file\."):
        texts_of(write("a\n", "a.md"))
    message = r"a.jsonl:1: has none of sentence1, .*To fix, say under columns of the source"
    with pytest.raises(ValueError, match=message):
        texts_of(write('{"body": "a"}\n', "a.jsonl"))


def test_lines_of_text_files_are_sliced(tmp_path):
    """Lines of the file: an empty one counts, and one that is left out is not even read."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n\nc\nd\n\xff\n")
    texts = [
        [row.text for row in read_sentences(Table(str(path)), lines=lines)]
        for lines in (":-1", "1:3", "-3:-1")
    ]
    assert texts == [["a", "c", "d"], ["c"], ["c", "d"]]
    with pytest.raises(ValueError, match="a.txt:5: is not UTF-8"):
        list(read_sentences(Table(str(path)), lines="-1:"))
    with pytest.raises(ValueError, match="a.txt: has 5 lines, and lines '5:' are none of them. To"):
        list(read_sentences(Table(str(path)), lines="5:"))
    with pytest.raises(ValueError, match="lines ':2' can be chosen of a .txt file alone. To fix"):
        list(read_sentences(Table("a.csv"), lines=":2"))


@pytest.fixture
def tokenizer(unigram_files):
    """That of a model like XLM-R, without a limit."""
    found = build_tokenizer(unigram_files["tokenizer.json"], 99)
    found.no_truncation()
    return found


ENDS = {
    "de": ["Am 3. Mai, z. B. um 9.30 Uhr, kam er.", "„Wer ist da?“", "Niemand (wirklich!)", "Ende"],
    "zh": ["他来了。", "“谁在那儿？”", "没有人！", "完"],
    "ar": ["جاء الرجل.", "من هناك؟", "لا أحد!", "نهاية"],
    "hi": ["वह आया।", "कौन है?", "कोई नहीं।", "अंत"],
    "th": ["เขามาแล้ว ใครอยู่ที่นั่น", "ไม่มีใคร", "จบ"],
}


@pytest.mark.parametrize("language", ENDS)
def test_articles_are_cut_at_the_ends_of_sentences(language, tokenizer):
    """Room for the longest sentence alone: each passage ends where a sentence does."""
    space = {"zh": "", "th": "\n"}.get(language, " ")
    sentences = ENDS[language]
    longest = max(len(tokenizer.encode(sentence).ids) for sentence in sentences)
    passages = cut_article(tokenizer, "", space.join(sentences), (1, longest))
    assert space.join(passages) == space.join(sentences)
    assert len(passages) > 1
    assert all(any(p.endswith(s) for s in sentences) for p in passages)
    assert max(len(tokenizer.encode(p).ids) for p in passages) <= longest
    assert cut_article(tokenizer, "", space.join(sentences), (1, 999)) == [space.join(sentences)]


def test_passages_have_the_title_and_keep_the_limits(tokenizer):
    count = lambda text: len(tokenizer.encode(text).ids)  # noqa: E731
    text = " ".join(f"The man number {n} reads a red book." for n in range(12))
    limits = (12, 3 * count("The man number 11 reads a red book."))
    passages = cut_article(tokenizer, "A title", text, limits, prompt="passage: ")
    assert all(passage.startswith("A title The man") for passage in passages)
    assert " ".join(p.removeprefix("A title ") for p in passages) == text
    assert max(count(f"passage: {passage}") for passage in passages) <= limits[1]
    # A title that leaves too little room is left out, and so is a passage that is too short.
    assert cut_article(tokenizer, text, "He reads.", limits) == []
    assert cut_article(tokenizer, text, "He reads.", (1, limits[1])) == ["He reads."]


@pytest.mark.parametrize("text", ["ไม่มีใคร" * 50, "没有人在那儿" * 50, "word " * 300])
def test_a_sentence_without_end_is_cut_at_the_limit(text, tokenizer):
    passages = cut_article(tokenizer, "", text, (1, 20))
    lengths = [len(tokenizer.encode(passage).ids) for passage in passages]
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert max(lengths) <= 21  # a part without its neighbours may begin with one token more
    # Words that the tokenizer does not know are one token.
    assert all(length >= 18 for length in lengths[:-1]) and (len(lengths) > 9 or "word" not in text)


def test_a_share_of_the_articles_is_cut_into_long_passages(unigram_files):
    articles = [f"Article {n} begins. " + "The man reads a book. " * 20 for n in range(60)]
    passages = PassagesConfig(min_tokens=2, max_tokens=30, long_share=0.3, long_max_tokens=4000)
    cut = build_cutter(passages, unigram_files["tokenizer.json"], 4000)
    counts = [len(cut("", article)) for article in articles]
    assert 6 <= counts.count(1) <= 30
    assert [len(cut("", article)) for article in reversed(articles)] == counts[::-1]


def test_articles_of_tables_and_lines(write, unigram_files):
    passages = PassagesConfig(min_tokens=1, max_tokens=60)
    cut = build_cutter(passages, unigram_files["tokenizer.json"], 60)
    texts = [
        [row.text for row in read_sentences(Table(str(write(content, name))), cut=cut)]
        for name, content in {
            "a.jsonl": '{"title": "T", "text": "One."}\n{"title": null, "text": "Two."}\n',
            "a.csv": "title,text\nT,One.\n,Two.\n",
            "a.txt": "One.\nTwo.\n",
        }.items()
    ]
    assert texts == [["T One.", "Two."], ["T One.", "Two."], ["One.", "Two."]]
    with pytest.raises(ValueError, match="a.jsonl:1: title is empty or no text. To fix"):
        list(read_sentences(Table(str(write('{"title": 1, "text": "x"}', "a.jsonl"))), cut=cut))
    bad = BadRows(skip=True)
    path = write('{"title": 1, "text": "x"}\n{"title": " ", "text": "x"}\n', "a.jsonl")
    assert list(read_sentences(Table(str(path)), bad, cut=cut)) == [Row("x")] and bad.count == 1


def test_a_file_without_texts_is_named(tmp_path):
    for name, content in (("a", "one\ntwo\none\n"), ("b", " \n\n")):
        (tmp_path / f"{name}.txt").write_text(content)
    assert read_texts([str(tmp_path / "a.txt")]) == ["one", "two"]
    with pytest.raises(ValueError, match=r"b\.txt: holds no text\. To fix, choose another file"):
        read_texts([str(tmp_path / "*.txt")])
