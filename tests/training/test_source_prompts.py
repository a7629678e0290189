"""The prompts that texts get in training, mining and calibration, by kind of source and role."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from bge_pruning.config.load import ConfigError
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.training.calibration import calibration_texts
from bge_pruning.training.sources import build_corpus, build_source

PROMPTS = {"query": "sings ", "passage": "reads ", "STS": "eats "}
ROWS = [
    {"query": "a cat", "pos": ["a dog"], "neg": ["a horse"]},
    {"query": "a dog", "pos": ["a cat"], "neg": ["there"], "prompt": "rides "},
    {"query": "a flute", "pos": ["a song"], "neg": ["here"], "prompt": ""},
]


@pytest.fixture
def prompted(base) -> BaseModel:
    """The tiny model, which has prompts for queries, passages and scored pairs."""
    return replace(base, prompts={"prompts": PROMPTS, "default_prompt_name": None})


@pytest.fixture
def files(tmp_path) -> Path:
    """The same few texts as every kind of source."""
    (tmp_path / "sts.csv").write_text("a cat,a dog,1\n")
    (tmp_path / "sentences.txt").write_text("a cat\n")
    lines = (json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "contrastive.jsonl").write_text("".join(lines))
    (tmp_path / "pairs.csv").write_text("query,pos,prompt\na cat,a dog,\na dog,there,rides \n")
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", ["a cat", "a dog", "here"]), ("queries", ["a cat", "there"])):
        rows = (json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (folder / "qrels" / "train.tsv").write_text("0\t1\t1\n1\t2\t1\n")
    return tmp_path


@pytest.fixture
def build(configure, files) -> Callable:
    def build(base: BaseModel, kind: str, name: str, more: str = "", embed: Callable | None = None):
        given = f"data.train=[{{name: x, kind: {kind}, path: '{files / name}', {more}}}]"
        config = configure(given)
        return build_source(config.data.train[0], config, base, embed, "model"), config

    return build


def texts_of(texts: TokenizedTexts, base: BaseModel) -> list[str]:
    tokenizer = Tokenizer.from_str(base.tokenizer_files["tokenizer.json"].decode())
    return [tokenizer.decode(texts[i].tolist()) for i in range(len(texts))]


OVERRIDE = "prompt: {query: 'red ', passage: ''}"


@pytest.mark.parametrize(
    ("kind", "name", "more", "expected"),
    [
        ("sts", "sts.csv", "", "eats a cat|eats a dog"),
        ("sts", "sts.csv", "prompt: 'red '", "red a cat|red a dog"),
        ("sentences", "sentences.txt", "", "a cat"),
        ("sentences", "sentences.txt", "prompt: {text: 'red '}", "red a cat"),
        ("sentences", "sts.csv", "prompt: 'red '", "red a cat|red a dog"),
        ("sentences", "sentences.txt", "role: passage", "reads a cat"),
        ("sentences", "sentences.txt", "role: query, prompt: 'red '", "red a cat"),
        ("contrastive", "pairs.csv", "", "sings a cat|reads a dog|rides a dog|reads there"),
        ("contrastive", "pairs.csv", "prompt: ''", "a cat|reads a dog|rides a dog|reads there"),
        ("contrastive", "pairs.csv", OVERRIDE, "red a cat|a dog|rides a dog|there"),
        ("beir", "beir", "", "sings a cat|reads a dog|sings there|reads here"),
        ("beir", "beir", "prompt: 'red '", "red a cat|reads a dog|red there|reads here"),
    ],
)
def test_every_text_gets_the_prompt_of_its_role(kind, name, more, expected, build, prompted):
    dataset, _ = build(prompted, kind, name, more)
    assert sorted(texts_of(dataset.texts, prompted)) == sorted(expected.split("|"))


def test_a_default_prompt_is_for_texts_without_a_role(build, prompted):
    """As encode() of sentence-transformers does it."""
    base = replace(prompted, prompts={**prompted.prompts, "default_prompt_name": "passage"})
    dataset, _ = build(base, "sentences", "sentences.txt")
    assert texts_of(dataset.texts, base) == ["reads a cat"]


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("written.jsonl", "", True),  # a file made for E5
        ("written.jsonl", "prompt: {query: '', passage: ''}", False),
        ("contrastive.jsonl", "", False),
        ("contrastive.jsonl", "prompt: 'a f'", False),  # one of three, by chance
    ],
)
def test_a_prompt_that_a_file_holds_already_is_named(
    name, more, said, build, prompted, files, messages
):
    rows = [{"query": "sings a cat", "pos": ["reads a dog"], "neg": []}] * 2
    (files / "written.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # read, then from the cache
        messages.clear()
        build(prompted, "contrastive", name, more)
        assert ("2 of 2 rows begin with their prompt, which" in messages.text) is said
        assert ("with their prompt" in messages.text) is said


@pytest.mark.parametrize(("prompt", "named"), [("red ", False), ("sings ", True), ("", True)])
def test_a_prompt_that_the_model_will_not_know_is_named(prompt, named, build, prompted, messages):
    """What is extracted has the prompts of the model's files, and keeps the tokens of these."""
    messages.set_level("INFO")
    build(prompted, "contrastive", "pairs.csv", f"prompt: '{prompt}'")
    shown = f"'{prompt}'" if prompt else "nothing"
    assert f"x: adds {shown} to a query" in messages.text
    assert "x: adds 'reads ' to a passage" in messages.text
    assert (f"do not name the prompt '{prompt}', so the finished" in messages.text) is not named


def test_a_row_has_its_own_prompt_or_says_that_there_is_none(build, prompted):
    dataset, _ = build(prompted, "contrastive", "contrastive.jsonl")
    queries = texts_of(dataset.texts, prompted)
    found = [queries[i] for i in dataset.rows.first]
    assert found == ["sings a cat", "rides a dog", "a flute"]


@pytest.mark.parametrize("more", ["", "prompt: {query: '', passage: ''}"])
def test_without_prompts_nothing_changes(more, build, base, prompted, files):
    """Not even the names of the caches, so that what is there is found again."""
    plain, _ = build(base, "beir", "beir")
    names = sorted(path.name for path in (files / "processed").iterdir())
    other, _ = build(prompted if more else replace(base, prompts={}), "beir", "beir", more)
    assert sorted(path.name for path in (files / "processed").iterdir()) == names
    assert other.rows.words is None
    for index in range(4):
        for key, value in plain[index].items():
            assert all(map(np.array_equal, value, other[index][key]))


def test_a_text_is_the_same_whatever_its_prompt(build, prompted):
    """Pairs given both ways round: "reads a cat" must be no negative of "sings a cat"."""
    dataset, _ = build(prompted, "contrastive", "contrastive.jsonl", "negatives: 1")
    first, second = dataset[0], dataset[1]
    assert second["passage_texts"][0] in first["positive_texts"]
    assert first["passage_texts"][0] in second["positive_texts"]
    assert not np.isin(first["passage_texts"][1], second["positive_texts"]).any()
    tokens = {tuple(ids) for item in (first, second) for ids in item["ids"]}
    assert len(tokens) == 6  # four words in six texts


def test_held_out_texts_are_found_whatever_their_prompt(build, base, prompted):
    """They are compared without prompts with what is evaluated."""
    plain, more = (
        build_corpus(config.data.train[0], config, model).keys
        for model in (base, prompted)
        for _, config in [build(model, "contrastive", "contrastive.jsonl")]
    )
    assert set(plain) == set(more) and len(more) > len(plain)


def test_mining_knows_positives_by_their_words(build, prompted):
    """All passages are as near to a query as its positive, which is not to be mined."""
    seen = []

    def embed(texts: TokenizedTexts, numbers: np.ndarray) -> np.ndarray:
        names = texts_of(texts, prompted)
        seen.extend(names[number] for number in numbers)
        return np.ones((len(numbers), 2), np.float32) / np.sqrt(2.0)

    mining = "mined_negatives: 2, mining_margin: 1.0, negatives: 1"
    dataset, _ = build(prompted, "beir", "beir", mining, embed)
    assert set(seen) == {"sings a cat", "sings there", "reads a cat", "reads a dog", "reads here"}
    texts = texts_of(dataset.texts, prompted)
    mined = [{texts[i] for i in dataset.rows.negatives_of(row)} for row in range(2)]
    assert mined == [{"reads a cat", "reads here"}, {"reads a cat", "reads a dog"}]


@pytest.mark.parametrize("role", ["", "role: query, "])
def test_a_replaced_token_is_none_of_a_prompt(role, build, base):
    more = f"replaced_tokens: 1.0, {role}prompt: 'red book '"
    dataset, _ = build(base, "sentences", "contrastive.jsonl", more)
    prompts = np.stack([dataset.texts[i][1:3] for i in range(len(dataset))])
    assert (prompts == prompts[0]).all()
    assert texts_of(dataset.texts, base)[0] == "red book a cat"


def test_gates_and_layers_are_fitted_to_texts_with_prompts(build, prompted):
    _, config = build(prompted, "beir", "beir")
    found = texts_of(calibration_texts(config, prompted, 3), prompted)
    assert all(text.startswith(("sings ", "reads ")) for text in found)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{query: 'q: '}", "names query; kind sentences has text. To fix, write one of these"),
        ("{text: null}", 'is None, not a text. To fix, write it in quotes, "" for none'),
        ("5", "is 5, not a text"),
    ],
)
def test_a_prompt_that_is_none_is_refused(prompt, message, build, base):
    with pytest.raises(ConfigError, match=f"prompt of data source 'x' {message}"):
        build(base, "sentences", "sentences.txt", f"prompt: {prompt}")


def test_a_prompt_of_held_out_data_is_refused(configure, sts_csv):
    data = f"data.eval=[{{name: dev, kind: sts, path: {sts_csv}, prompt: 'a '}}]"
    with pytest.raises(ConfigError, match=r"prompt of data.eval 'dev' would be for nothing.*To fi"):
        configure(data)
