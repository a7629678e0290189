"""What a trimmed vocabulary saves and loses, as Markdown."""

from bge_pruning.export.vocabulary_report import render_vocabulary

ROW = {
    "corpus": "news.txt",
    "role": "held out",
    "texts": 1400,
    "tokens": 25000,
    "tokens_kept": 0.98765,
    "texts_same": 0.75,
    "growth": 1.0246,
    "unknown_before": 0.0,
    "unknown_after": 0.001,
}
REPORT = {
    "vocabulary": {"source": 250002, "kept": 30000, "required": 1234, "rows_saved": 220002},
    "scripts": ["CYRILLIC", "LATIN"],
    "parameters": {"source": 1000, "trimmed": 600, "saved": 400, "share_saved": 0.4},
    "coverage": [ROW, {**ROW, "corpus": "other.txt"}],
}


def test_what_is_saved():
    first = render_vocabulary(REPORT)[0]
    assert first == (
        "30,000 of 250,002 tokens are kept, 1,234 of them whatever the texts hold (special tokens, "
        "and single characters; scripts: Cyrillic, Latin). 220,002 rows of the embeddings and 400 "
        "parameters (40.0% of the model) are saved."
    )


def test_no_script():
    assert "scripts: none" in render_vocabulary({**REPORT, "scripts": []})[0]


def test_a_card_tells_no_folders_and_its_table_stays_one():
    names = ("/home/me/secret/news.txt", "a|b.txt", "data/sentences/newstest2019-en.txt.gz")
    rows = [{**ROW, "corpus": name} for name in names]
    table = render_vocabulary({**REPORT, "coverage": rows})[1]
    expected = ["news.txt", r"a\|b.txt", "data/sentences/newstest2019-en.txt.gz"]
    for line, name in zip(table.splitlines()[2:], expected, strict=True):
        assert line.startswith(f"| {name} | held out |")


def test_a_row_for_each_corpus():
    lines = render_vocabulary(REPORT)[1].splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("| corpus | role | texts | tokens | tokens kept |")
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == (
        "| news.txt | held out | 1,400 | 25,000 | 98.77% | 75.00% | 1.025 | 0.00% | 0.10% |"
    )
    assert lines[3].startswith("| other.txt |")
