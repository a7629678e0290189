"""From a configured source to its examples."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from bge_pruning.config.load import Config, ConfigError
from bge_pruning.datasets import mteb_dataloader
from bge_pruning.datasets.contrastive_dataset import ContrastiveDataset
from bge_pruning.datasets.embedding_dataset import EmbeddingDataset
from bge_pruning.training.builders import build_base_model, build_teacher
from bge_pruning.training.data_builders import build_train_loader
from bge_pruning.training.sources import (
    build_corpus,
    build_source,
    fingerprint_source,
    fingerprint_sources,
    rows_to_draw,
)
from tests.common.hub import jsonl

ONLY = "loss={sts_regression: 0.0, distillation_alignment: 0.0, distillation_similarity: 0.0,"
DOCUMENTS = ["the man plays", "a dog eats", "a cat", "the woman reads", "a red book", "a horse"]


@pytest.fixture
def collection(tmp_path) -> Path:
    """Two judged queries over six passages."""
    folder = tmp_path / "collection"
    (folder / "qrels").mkdir(parents=True)
    queries = {"q1": "the man", "q2": "a woman"}
    for name, rows in (("corpus", dict(enumerate(DOCUMENTS))), ("queries", queries)):
        text = "".join(json.dumps({"_id": str(i), "text": t}) + "\n" for i, t in rows.items())
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "qrels" / "train.tsv").write_text("q1\t0\t1\nq2\t3\t1\nq2\t2\t0\n")
    return folder


def source(kind: str, path: object, more: str = "") -> str:
    """The override that trains on one source."""
    return f"data.train=[{{name: x, kind: {kind}, path: '{path}', {more}}}]"


def build(config: Config, embed=None):
    base = build_base_model(config)
    return build_source(config.data.train[0], config, base, embed, "model")


def texts_of(dataset, index: int, config: Config) -> list[str]:
    tokenizer = Tokenizer.from_file(str(Path(config.model.base_model) / "tokenizer.json"))
    return [tokenizer.decode(ids.tolist()) for ids in dataset[index]["ids"]]


def test_scores_are_scaled_from_their_range(configure, tmp_path):
    (tmp_path / "p.csv").write_text("a cat,a dog,-1\na red,a book,0\na horse,there,1\n")
    config = configure(source("sts", tmp_path / "p.csv", "score_range: [-1, 1]"))
    dataset = build(config)
    assert isinstance(dataset, EmbeddingDataset)
    assert dataset.scores.tolist() == [0.0, 0.5, 1.0]
    assert texts_of(dataset, 1, config) == ["a red", "a book"]


@pytest.mark.parametrize(
    ("scores", "score_range", "warned"),
    [
        ((0.1, 1.0), "[0, 5]", "x: no score is above 1, and its score_range goes from 0 to 5: all"),
        ((0, 5), "[0, 100]", "x: no score is above 5, and its score_range goes from 0 to 100: all"),
        ((0.1, 1.3), "[0, 5]", ""),
        ((0.1, 1.0), "[0, 1]", ""),
        ((-1.0, 0.1), "[-1, 1]", ""),
    ],
)
def test_scores_of_another_range_are_warned_of(
    scores, score_range, warned, configure, tmp_path, caplog
):
    (tmp_path / "p.csv").write_text(f"a cat,a dog,{scores[0]}\na red,a book,{scores[1]}\n")
    config = configure(source("sts", tmp_path / "p.csv", f"score_range: {score_range}"))
    for _ in range(2):  # from the file and from the cache
        caplog.clear()
        build(config)
        messages = [message for message in caplog.messages if "score_range" in message]
        assert len(messages) == bool(warned) and "".join(messages).startswith(warned)


def test_columns_have_other_names(configure, tmp_path):
    (tmp_path / "p.csv").write_text("first,second,gold\na cat,a dog,5\n")
    columns = "columns: {sentence1: %s, sentence2: second, score: gold}"
    config = configure(source("sts", tmp_path / "p.csv", columns % "first"))
    assert texts_of(build(config), 0, config) == ["a cat", "a dog"]
    for path, more, message in (
        ("p.csv", columns % "zzz", r"p.csv:1: the header lacks zzz. To fix, rename columns"),
        ("p.csv", columns % "second", r"columns gives two of sentence1, .* the same name"),
        ("hf://", "", r"hf:// names no dataset. To fix, write hf://owner/name"),
    ):
        path = path if path == "hf://" else tmp_path / path
        with pytest.raises(ValueError, match=message):
            build(configure(source("sts", path, more)))


def test_rows_of_a_collection(configure, collection):
    config = configure(source("beir", collection))
    dataset = build(config)
    assert isinstance(dataset, ContrastiveDataset)
    assert texts_of(dataset, 0, config) == ["the man", "the man plays"]
    assert len(dataset) == 2
    assert len(dataset.texts) == 5  # passages that nobody judged are not read


def embed_by_length(texts, numbers) -> np.ndarray:
    """Vectors whose products are known: on a quarter circle, by the number of the text."""
    angles = numbers / len(texts)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_negatives_are_mined_among_all_passages(configure, collection):
    mining = "mined_negatives: 3, mining_margin: 1.0, negatives: 4"
    config = configure(source("beir", collection, mining))
    dataset = build(config, embed_by_length)
    assert len(dataset.texts) == 2 + len(DOCUMENTS)
    assert len(dataset) == 2
    vectors = embed_by_length(dataset.texts, np.arange(len(dataset.texts)))
    rows = dataset.rows
    for row in range(2):
        start = rows.starts[row]
        query, *positives = rows.texts[start : start + 1 + rows.positives[row]].tolist()
        found = rows.negatives_of(row).tolist()
        assert not set(positives) & set(found)
        limit = max(vectors[query] @ vectors[p] for p in positives)
        mined = found if row == 0 else found[1:]  # the second has a given one too
        assert len(mined) == len(set(mined))
        assert all(vectors[query] @ vectors[n] <= limit for n in mined)
    again = build(config, lambda *_: pytest.fail("mined before"))
    assert np.array_equal(again.rows.texts, rows.texts)


def test_a_querys_own_passage_is_neither_mined_nor_a_negative(configure, collection):
    """Whatever the margin; nor does it set what a negative may score."""
    with (collection / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "q1", "title": "here", "text": "the man"}) + "\n")
    mining = "mined_negatives: 9, mining_margin: 1.0, negatives: 1"

    def embed(texts, numbers):
        """The query's own passage, the last text, is a bit farther from it than its positive."""
        angles = np.arange(len(texts)) / len(texts)
        vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        vectors[own] = vectors[1] * 0.999
        return vectors[numbers]

    config = configure(source("beir", collection, mining))
    corpus = build_corpus(config.data.train[0], config, build_base_model(config))
    assert corpus.rows.positives.tolist()[:3] == [1, 1, 0]
    query, own = corpus.rows.texts[corpus.rows.starts[2] :][:2].tolist()
    dataset = build(config, embed)
    assert dataset.rows.first[0] == query
    assert own not in dataset.rows.negatives_of(0)
    assert own in dataset[0]["positive_texts"]


def test_a_query_without_any_mined_negative_is_left_out(configure, collection, messages):
    """One of many must not end the run, after everything was embedded."""
    config = configure(source("beir", collection, "mined_negatives: 3, negatives: 1"))
    # All passages are as near as the positive. The second query has a negative that is given.
    alike = lambda texts, numbers: np.full((len(numbers), 4), 0.5, np.float32)  # noqa: E731
    dataset = build(config, alike)
    assert texts_of(dataset, 0, config)[0] == "a woman" and len(dataset) == 1
    message = "1 of 2 queries are left out, as no negative of theirs was found. To fix, raise min"
    assert message in messages.text


def test_positives_are_perturbed_where_a_query_has_no_negative(configure, tmp_path, messages):
    rows = [
        {"query": "a cat", "pos": ["the man plays here", "a red book"], "neg": []},
        {"query": "a dog", "pos": ["the woman reads"], "neg": ["there"]},
        {"query": "a horse", "pos": ["cat"], "neg": []},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = "perturbed_negatives: 9, negatives: 2, prompt: {passage: 'there '}"
    config = configure(source("contrastive", path, more), "seed=5")
    dataset, again = build(config), build(config)
    assert "1 of 3 queries are left out, as no negative of theirs was found" in messages.text
    assert np.array_equal(dataset.texts.ids, again.texts.ids)
    other = build(configure(source("contrastive", path, more), "seed=6"))
    assert not np.array_equal(dataset.texts.ids, other.texts.ids)
    assert [len(dataset.rows.negatives_of(row)) for row in range(2)] == [9, 1]
    read = [texts_of(dataset, epoch * 2, config) for epoch in range(20)]
    positives = {f"there {text}" for text in rows[0]["pos"]}
    found = {text for example in read for text in example[2:]}
    assert len(found) > 3 and not found & positives
    assert {example[1] for example in read} == positives
    words = [set(text.split()) for text in positives]
    for text in found:
        assert text.startswith("there ") and any(set(text.split()) <= known for known in words)
    for example in (dataset[0], dataset[2]):  # no copy is a known positive
        assert not set(example["passage_texts"][1:]) & set(example["positive_texts"])
    # A cache of the teacher's outputs has a number for each copy.
    assert dataset.texts_of(np.arange(0, 40, 2)).max() < len(dataset.texts)


def test_mined_negatives_are_used_in_training(configure, collection):
    mining = "mined_negatives: 2, mining_margin: 1.0, negatives: 1, in_batch_negatives: false"
    loss = ONLY + " contrastive: 1.0}"
    config = configure(source("beir", collection, mining), loss, "global_train_batch_size=2")
    base = build_base_model(config)
    teacher = build_teacher(config, base)
    assert teacher is not None  # to mine with, though nothing is distilled
    (batch,) = list(build_train_loader(config, base, teacher).dataloader)
    assert batch["input_ids"].shape[:2] == (2, 3)
    assert batch["own_passages_only"].tolist() == [True, True]
    assert not [key for key in batch if key.startswith("teacher")]


def test_scores_of_rows_are_used_where_a_source_has_them(configure, tmp_path):
    row = {"query": "a cat", "pos": ["a dog"], "neg": ["there"]}
    scored = {**row, "pos_scores": [2.0], "neg_scores": [1.0]}
    contents = {"with": [scored], "without": [row], "half": [row, scored]}
    for name, rows in contents.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def scored_by(name: str) -> Config:
        path = tmp_path / f"{name}.jsonl"
        loss = ONLY + " score_distillation: 1.0}"
        return configure(source("contrastive", path, "negatives: 1"), loss)

    assert build(scored_by("with"))[0]["passage_scores"].tolist() == [2.0, 1.0]
    without = scored_by("without")
    assert "passage_scores" not in build(without)[0]
    with pytest.raises(ConfigError, match="score_distillation needs rows with pos_scores.*has an"):
        build_train_loader(without, build_base_model(without), None)
    with pytest.raises(ConfigError, match=r"x: 2 passages have no pos_scores or neg_scores"):
        build(scored_by("half"))
    # One source with scores and one without, which needs another loss.
    both = [
        f"{{name: {n}, kind: contrastive, path: {tmp_path / n}.jsonl, negatives: 1}}"
        for n in ("with", "without")
    ]
    for loss, refused in (("", True), (", contrastive: 1.0", False)):
        given = [f"data.train=[{', '.join(both)}]", f"{ONLY} score_distillation: 1.0{loss}}}"]
        config = configure(*given, "global_train_batch_size=1")
        expected = pytest.raises(ConfigError, match=r"no loss applies to .*'without'.*To fix, add")
        with expected if refused else nullcontext():
            build_train_loader(config, build_base_model(config), None)


def test_wrong_rows_stop_or_are_skipped_and_reported(configure, tmp_path, caplog):
    path = tmp_path / "p.csv"
    path.write_text("a cat,a dog,5\na red,,1\na horse,there,9\na book,a man,2\n")
    with pytest.raises(ValueError, match=r"p.csv:2: sentence2 is empty"):
        build(configure(source("sts", path)))
    for _ in range(2):  # said again when the rows come from the cache
        caplog.clear()
        assert len(build(configure(source("sts", path), "data.on_bad_row=skip"))) == 2
        assert "x: 2 rows skipped" in caplog.text
        assert "p.csv:3: score '9' is not a number" in caplog.text


@pytest.mark.parametrize(
    "override",
    [
        "model.max_length=5",
        "data.on_bad_row=skip",
        "data.train=[{name: t, kind: sentences, path: PATH}]",
        "data.train=[{name: t, kind: sts, path: PATH, score_range: [0, 6]}]",
    ],
)
def test_other_settings_or_content_have_another_cache(override, configure, sts_csv, tmp_path):
    """The name of a file does not matter."""
    same, other = tmp_path / "same.csv", tmp_path / "other.csv"
    same.write_bytes(sts_csv.read_bytes())
    other.write_text("a,b,2\n" * 9)
    for given, count in (
        ((), 1),
        ((source("sts", same),), 1),
        ((override.replace("PATH", str(sts_csv)),), 2),
        ((source("sts", other),), 3),
    ):
        build(configure(*given))
        assert len(list((tmp_path / "processed").glob("rows-*"))) == count


def test_a_task_of_mteb_is_read_by_its_name(configure, monkeypatch, collection):
    calls = []

    def read(name, split, subset, bad):
        calls.append((name, split, subset))
        return mteb_dataloader.read_beir(collection, "train", bad)

    monkeypatch.setattr(mteb_dataloader, "read_mteb", read)
    assert len(build(configure(source("mteb", "SciFact", "split: test")))) == 2
    assert set(calls) == {("SciFact", "test", None)}


PAIRS = "a cat,the dog,1\nthe man,a horse,2\n"
PAIR = '{"sentence1": "a", "sentence2": "b", "score": '
ROW = '{"query": "a", "pos": ["b"], "neg": []'


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("sts", "a.csv", " \n\n", "x: holds no rows. To fix, choose another file"),
        ("sts", "a.csv", "sentence1,sentence1,sentence2,score\na,b,c,1\n", "names sentence1 twice"),
        ("sts", "a.csv", f'{PAIRS}"a cat,the dog,1\n{PAIRS}', "inside of a quoted cell.*left open"),
        ("sts", "a.jsonl", PAIR + "true}", "score 'True'"),
        ("sts", "a.jsonl", PAIR + "9" * 400 + "}", f"score '{'9' * 40}' is not a number"),
        ("sts", "a.jsonl", "9" * 5000, r"a.jsonl:1: is not JSON \(Exceeds the limit"),
        ("contrastive", "a.jsonl", f"{ROW}, " + '"pos_scores": [' + "9" * 400 + "]}", "1 numbers"),
        ("contrastive", "a.jsonl", f"{ROW}, " + '"pos_scores": [true]}', "must be 1 numbers"),
        ("contrastive", "a.csv", "query,pos\na,sky, water\n", "has 3 columns, expected 2 as in"),
        (
            "sentences",
            "a.csv",
            "id,lang,body\n1,en,a cat\n",
            "names no column s.* columns: {text: ...}",
        ),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_odd_files(kind, name, content, message, skip, configure, tmp_path):
    (tmp_path / name).write_text(content)
    overrides = ["data.on_bad_row=skip"] if skip else []
    config = configure(source(kind, tmp_path / name), *overrides)
    lost = skip and not any(word in message for word in ("left open", "twice", "columns: "))
    with pytest.raises(ValueError, match="x: holds no rows" if lost else message):
        build(config)
    assert not list((tmp_path / "processed").glob("*"))


def test_articles_become_passages_in_the_tokens_of_the_model(configure, tmp_path):
    """Titles count; other settings are another cache."""
    (tmp_path / "a.csv").write_text("title,text\na cat,the man plays. a dog eats. the man.\n")
    found = []
    for limit in (12, 9):
        more = f"passages: {{min_tokens: 3, max_tokens: {limit}}}"
        config = configure(source("sentences", tmp_path / "a.csv", more))
        dataset = build(config)
        found.append([texts_of(dataset, n, config)[0] for n in range(len(dataset))])
        assert dataset.texts.lengths.max() <= limit and not dataset.texts.truncated
        assert all(text.startswith("a cat") for text in found[-1])
    assert len(found[0]) < len(found[1])


def test_passages_longer_than_the_model_reads(configure, tmp_path):
    (tmp_path / "a.txt").write_text("a cat.\n")
    more = "passages: {min_tokens: 3, max_tokens: 5000}"
    config = configure(source("sentences", tmp_path / "a.txt", more), "model.max_length=8000")
    with pytest.raises(ValueError, match="passages have up to 5000 tokens, and the model reads"):
        build(config)


def test_sentences_with_replaced_tokens(configure, tmp_path):
    (tmp_path / "a.txt").write_text("a cat\nthe man and the dog\n")
    plain, noisy = (
        build(configure(source("sentences", tmp_path / "a.txt", f"replaced_tokens: {share}")))
        for share in (0, 1.0)
    )
    assert np.array_equal(plain.texts.starts, noisy.texts.starts)
    same = plain.texts.ids == noisy.texts.ids
    assert not same.all()
    ends = np.concatenate([noisy.texts.starts[:-1], noisy.texts.starts[1:] - 1])
    assert same[ends].all()  # <s> and </s>
    assert not set(noisy.texts.ids[~same].tolist()) & {0, 1, 2, 3}


def write_texts(folder: Path, count: int = 40) -> Path:
    """A dataset of texts in two files."""
    folder.mkdir(exist_ok=True)
    for part in range(2):
        texts = [{"text": f"a red book {part} {i}"} for i in range(count // 2)]
        (folder / f"part-{part}.jsonl").write_text(jsonl(texts))
    return folder


def test_the_first_rows_of_files_and_of_datasets(configure, tmp_path):
    folder = write_texts(tmp_path / "texts")
    for more in ("rows: 25", "rows: 25, data_files: 'part-*.jsonl'", "data_files: 'part-1.jsonl'"):
        for path in (folder if "files" in more else folder / "*.jsonl", f"hf://{folder}"):
            config = configure(source("sentences", path, more))
            assert len(build(config)) == (25 if "rows" in more else 20)
            assert ("rows" in fingerprint_source(config.data.train[0], config)) == ("rows" in more)


def test_a_stream_is_drawn_once_for_what_the_run_needs(configure, tmp_path, offline, monkeypatch):
    folder = write_texts(tmp_path / "texts")
    options = ("max_duration=3ba", "global_train_batch_size=4")
    config = configure(source("sentences", f"hf://{folder}", "streaming: true"), *options)
    assert rows_to_draw(config.data.train[0], config) == 16
    first = build_corpus(config.data.train[0], config, build_base_model(config))
    assert len(first.rows) == 16
    prints = fingerprint_sources(config)
    assert prints["train"]["x"].keys() == {f"hf://{folder}"}
    # It resumes when the dataset cannot be reached any more.
    shutil.rmtree(folder)
    assert fingerprint_sources(config) == prints
    again = build_corpus(config.data.train[0], config, build_base_model(config))
    assert np.array_equal(again.keys, first.keys)
    other = configure(source("sentences", f"hf://{folder}", "streaming: true"), *options, "seed=4")
    with pytest.raises(FileNotFoundError, match=r"hf://.*: cannot load split 'train'"):
        fingerprint_sources(other)


def test_a_stream_has_its_share_of_the_batches(configure, tmp_path):
    (tmp_path / "t.txt").write_text("a cat\n" * 9)
    both = (
        f"data.train=[{{name: s, kind: sentences, path: 'hf://{tmp_path}', streaming: true, "
        f"weight: 1}}, {{name: t, kind: sentences, path: '{tmp_path}/t.txt', weight: 3}}]"
    )
    config = configure(both, "max_duration=100ba", "global_train_batch_size=4")
    assert rows_to_draw(config.data.train[0], config) == (25 + 2) * 4
    # Of the steps of each part its share, and as many more as there are sources.
    stages = "data.stages=[{steps: 90, weights: {t: 1}}, {until: 1dur}]"
    config = configure(both, "max_duration=100ba", "global_train_batch_size=4", stages)
    assert rows_to_draw(config.data.train[0], config) == (0 + 2 + 3 + 2) * 4


def test_datasets_that_are_missing_are_named_together(configure, tmp_path, offline):
    missing = ", ".join(f"{{name: {n}, kind: sentences, path: 'hf://no/{n}'}}" for n in "abc")
    message = r"^hf://no/a: cannot load .* Also missing of data: train\.b, train\.c\.$"
    with pytest.raises(FileNotFoundError, match=message):
        fingerprint_sources(configure(f"data.train=[{missing}]"))
