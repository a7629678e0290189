"""Line-parallel files: pairs of languages, rows with translations, collections, wrong files."""

import pytest

from bge_pruning.datasets.contrastive_dataset import known_positives
from bge_pruning.datasets.parallel_texts import find_parallel, parallel_collection, read_parallel
from bge_pruning.datasets.rows import BadRows, Row
from bge_pruning.datasets.text_corpus import number_texts
from tests.common.data import write_parallel

LINES = {"de": "eins/zwei/drei/vier", "en": "one/two/three/four", "th": "a/b/c/d"}


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["de", "en"], "de>en"),
        (["de-en"], "de>en"),
        (["de-en", "th-de", "en-de"], "de>en th>de en>de"),
        (["de", "en", "th"], "de>en de>th en>de en>th th>de th>en"),
        (["zh-TW", "en"], "zh-TW>en"),
        (["zh-TW-en", "de-zh-TW"], "zh-TW>en de>zh-TW"),
        (["zh-TW-pt-BR"], "zh-TW>pt-BR"),
    ],
)
def test_languages_and_pairs_of_them(names, pairs, tmp_path):
    path = write_parallel(tmp_path, **LINES, zh_TW="1/2/3/4", pt_BR="1/2/3/4")
    found = find_parallel(path, names)
    assert " ".join(">".join(pair) for pair in found.pairs) == pairs
    assert all(file.is_file() and name in file.name for name, file in found.files.items())


@pytest.mark.parametrize(
    ("lines", "numbers"),
    [(None, "1234"), (":-2", "12"), ("-2:", "34"), ("1:3", "23"), ("-9:-3", "1"), (":", "1234")],
)
def test_lines_are_sliced_as_in_python(lines, numbers, tmp_path):
    texts = find_parallel(write_parallel(tmp_path, **LINES), ["de", "en"], lines)
    expected = [
        Row(LINES["de"].split("/")[int(n) - 1], (LINES["en"].split("/")[int(n) - 1],), 1)
        for n in numbers
    ]
    assert list(read_parallel(texts)) == expected
    assert [row["id"] for row in parallel_collection(texts).queries] == [*numbers]


def test_a_line_in_more_languages_has_all_its_translations_as_positives(tmp_path):
    path = write_parallel(tmp_path, de="eins", en="one", th="eins")
    rows = list(read_parallel(find_parallel(path, ["de", "en", "th"])))
    assert rows == [
        Row("eins", ("one", "eins"), 2), Row("one", ("eins",), 1), Row("eins", ("eins", "one"), 2)
    ]  # fmt: skip


def test_no_translation_is_a_negative_though_another_pair_has_it(tmp_path):
    texts = find_parallel(write_parallel(tmp_path, **LINES), ["de-en", "en-th"], ":1")
    rows = number_texts(read_parallel(texts))
    queries, own = (rows.select(rows.positives == n) for n in (1, 0))
    known, bounds = known_positives(queries, own)
    # Numbers of texts in order: eins, one, a.
    assert queries.texts.tolist() == [0, 1, 1, 2]
    assert [sorted(known[slice(*ends)]) for ends in bounds] == [[1, 2], [2]]


def test_lines_with_one_text_are_all_relevant(tmp_path):
    path = write_parallel(tmp_path, de="a/b/b/d/e", en="x/x/y/z/ z ")
    found = parallel_collection(find_parallel(path, ["de", "en"]))
    assert [row["text"] for row in found.corpus] == ["x", "x", "y", "z", "z"]
    relevant = {query: "".join(scores) for query, scores in found.relevant.items()}
    assert relevant == {"1": "12", "2": "123", "3": "123", "4": "45", "5": "45"}
    assert not found.own


def test_empty_lines_and_lines_that_are_no_text(tmp_path):
    """Empty in all files: left out; in one: invalid, and skipped as a whole if that is asked."""
    path = write_parallel(tmp_path, de="a//c/d", en="x// /z")
    texts = find_parallel(path, ["de", "en"])
    message = r"news-en\.txt\.gz:3: is empty, and news-de\.txt\.gz has a text there\. To fix, write"
    for read in (lambda: list(read_parallel(texts)), lambda: parallel_collection(texts)):
        with pytest.raises(ValueError, match=message):
            read()
    bad = BadRows(skip=True)
    assert [row.text for row in read_parallel(texts, bad)] == ["a", "d"]
    assert bad.count == 1
    assert len(parallel_collection(texts, BadRows(skip=True)).queries) == 2
    plain = path.removesuffix(".gz")
    for name, content in (("de", b"a\n\xff\nc\n"), ("en", b"x\ny\nz\n")):
        (tmp_path / f"news-{name}.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"news-de\.txt:2 is not UTF-8"):
        list(read_parallel(find_parallel(plain, ["en-de"])))
    rows = read_parallel(find_parallel(plain, ["en-de"]), BadRows(skip=True))
    assert [row.words for row in rows] == [("x", "a"), ("z", "c")]
    assert len(list(read_parallel(find_parallel(plain, ["en-de"], "2:")))) == 1


@pytest.mark.parametrize(
    ("names", "lines", "message"),
    [
        (["de", "xx"], None, r"news-xx\.txt\.gz: no such file. To fix, check the path"),
        (["de-xx"], None, r"news-xx\.txt\.gz: no such file"),
        (["de", "short"], None, r"news-short\.txt\.gz:3: is the last line, and .*news-de\.txt\.gz "
         r"has 4: line n must be the same sentence in both. To fix"),
        (["de", "none"], None, r"news-none\.txt\.gz: holds no text. To fix, leave none out"),
        (["de", "half"], "-2:", r"news-half\.txt\.gz: holds no text among lines -2:. To fix"),
        (["de", "en"], "4:", r"news-de\.txt\.gz: has 4 lines, and lines '4:' are none of them"),
        (["de", "en"], "-400", "lines '-400' is not FIRST:LAST as Python slices a list. To fix"),
        (["de", "en"], "::2", "lines '::2' is not FIRST:LAST"),
        (["de", "de"], None, "languages de, de are not two or more different ones.*To fix, write"),
        (["de-de"], None, "languages de-de are not two or more different ones"),
        (["de-en", "de-en"], None, "languages de-en, de-en are not two or more different ones"),
        (["de"], None, "languages de are not two or more different ones"),
        ([], None, "are not two or more different ones"),
        (["de", "th-en"], None, "languages de, th-en mix languages with pairs. To fix, give lang"),
    ],
)  # fmt: skip
def test_wrong_languages_lines_and_files(names, lines, message, tmp_path):
    extra = {"short": "1/2/3", "none": "/ //", "half": "1/2/ /"}
    path = write_parallel(tmp_path, **LINES, **extra)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(read_parallel(find_parallel(path, names, lines), BadRows(skip=True)))


def test_a_path_without_a_language_and_a_search_in_many(tmp_path):
    path = write_parallel(tmp_path, **LINES)
    message = r"news-de\.txt\.gz: has no {language}\. To fix, write {language} for the language in"
    with pytest.raises(ValueError, match=message):
        find_parallel(path.replace("{language}", "de"), ["de", "en"])
    with pytest.raises(ValueError, match="is searched for one pair of languages, not 6. To fix, n"):
        parallel_collection(find_parallel(path, ["de", "en", "th"]))
