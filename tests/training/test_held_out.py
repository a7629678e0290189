"""What is evaluated on and trained on too: counted, named, refused unless the key allows it."""

import json
import logging
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from bge_pruning.config.load import Config, ConfigError, load_config
from bge_pruning.config.schema import SourceConfig
from bge_pruning.datasets.rows import BadRows
from bge_pruning.datasets.text_files import text_key
from bge_pruning.evaluation.tasks import beir_task, find_tasks
from bge_pruning.training import held_out
from bge_pruning.training.builders import build_base_model
from bge_pruning.training.data_builders import build_collections
from bge_pruning.training.held_out import check_held_out, find_keys
from bge_pruning.training.sources import source_reader
from tests.common.data import write_parallel

PAIRS = "the man,a dog,1\nA  Cat,a red book,2\na horse,the park,3\n"
QUERIES = {"q1": "the man", "q2": "a  Woman reads", "q3": "a child"}


@pytest.fixture
def files(tmp_path) -> Path:
    """Three pairs and three queries to evaluate."""
    (tmp_path / "dev.csv").write_text(PAIRS)
    folder = tmp_path / "docs"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "a dog eats"}\n')
    lines = [json.dumps({"_id": name, "text": text}) for name, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    (folder / "qrels" / "test.tsv").write_text("".join(f"{name}\td\t1\n" for name in QUERIES))
    return tmp_path


def train_on(files: Path, name: str, content: str, kind: str) -> str:
    (files / name).write_text(content)
    return f"{{name: {name.partition('.')[0]}, kind: {kind}, path: {files / name}}}"


def check(config: Config) -> None:
    base = build_base_model(config)
    check_held_out(config, base, build_collections(config, base))


def evaluated(files: Path) -> str:
    docs = f"{{name: docs, kind: beir, path: {files / 'docs'}, split: test}}"
    return f"data.eval=[{{name: dev, kind: sts, path: {files / 'dev.csv'}}}, {docs}]"


QUERY = json.dumps({"query": "a woman READS", "pos": ["a song"], "neg": []}) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("p.csv", "a dog,the man,5\nhere,there,0\n", "sts", "dev: 1 of 3 pairs are trained on too, "
         "in p, such as 'the man' and 'a dog'; docs: 1 of 3 queries are trained on too, in p, such "
         "as 'the man'"),
        ("t.txt", "a red book\na horse\na cat\n", "sentences", "dev: 1 of 3 pairs are trained on "
         "too, in t, such as 'A  Cat' and 'a red book'"),
        ("c.jsonl", QUERY, "contrastive", "docs: 1 of 3 queries are trained on too, in c, such as "
         "'a  Woman reads'"),
    ],
)  # fmt: skip
def test_what_is_trained_on_is_refused_or_named(
    name, content, kind, message, files, configure, caplog
):
    train = f"data.train=[{train_on(files, name, content, kind)}]"
    with pytest.raises(ConfigError) as caught:
        check(configure(train, evaluated(files), "data.on_trained_eval=error"))
    fix = "To fix, leave them out of the training data or out of what is evaluated, or set "
    assert str(caught.value) == (
        f"{message}. A score there tells what the model remembers. {fix}data.on_trained_eval=warn."
    )
    with caplog.at_level(logging.WARNING):
        check(configure(train, evaluated(files), "data.on_trained_eval=warn"))
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == message.split("; ")


def test_what_is_not_refused(files, configure):
    """A pair of which one sentence is trained on, or a passage; the texts of two sources count."""
    one = train_on(files, "t.txt", "a dog\na dog eats\na horse\n", "sentences")
    check(configure(f"data.train=[{one}]", evaluated(files), "data.on_trained_eval=error"))
    other = train_on(files, "u.txt", "the man\n", "sentences")
    both = configure(f"data.train=[{one}, {other}]", evaluated(files), "data.on_trained_eval=error")
    with pytest.raises(ConfigError, match="dev: 1 of 3 pairs are trained on too, in t, u, such as"):
        check(both)


def test_tasks_that_a_finished_model_is_judged_by(files, configure):
    train = train_on(files, "t.txt", "the man\na dog\n", "sentences")
    config = configure(f"data.train=[{train}]", "data.eval=[]", "data.on_trained_eval=error")
    tasks = {t.name: t for t in find_tasks([str(files / "dev.csv")], [str(files / "docs")])}
    with pytest.raises(ConfigError, match="dev: 1 of 3 pairs .*; docs: 1 of 3 queries .*'the man'"):
        check_held_out(config, build_base_model(config), tasks)


@pytest.mark.parametrize(
    ("train", "found"),
    [
        ("kind: parallel, languages: [de, en], lines: ':-2'", ""),
        ("kind: parallel, languages: [de, en], lines: ':-1'", "2 of 4 sentences .* 'drei'"),
        ("kind: parallel, languages: [en, th]", "2 of 4 sentences .* 'three'"),
        ("kind: sentences, lines: ':-2'", ""),
        ("kind: sentences", "4 of 4 sentences .* 'drei'"),
    ],
)
def test_neither_side_of_a_translation_may_be_trained_on(train, found, configure, tmp_path):
    path = write_parallel(tmp_path, de="eins/zwei/drei/vier", en="one/two/three/four", th="a/b/c/d")
    files = path.replace("{language}", "*") if "sentences" in train else path
    test = f"{{name: e, kind: parallel, path: '{path}', languages: [de-en], lines: '-2:'}}"
    config = configure(
        f"data.train=[{{name: t, path: '{files}', {train}}}]",
        *(f"data.eval=[{test}]", "data.on_trained_eval=error"),
    )
    refused = pytest.raises(ConfigError, match=f"^e: {found}") if found else nullcontext()
    with refused:
        check(config)


ROOT = Path(__file__).parents[2]
DEV = "stsb-en-dev: 56 of 1,500 pairs"
STUDY = [DEV, "stsb-en-test: 62 of 1,379 pairs", "scifact: 2 of 300 queries"]
TESTS = (["data/sts/stsb-en-test.csv"], ["data/mteb/scifact", "data/mteb/qed-nq-en"])


@pytest.mark.parametrize(
    ("name", "tests", "expected"),
    [
        ("bge_m3/target_60pct", TESTS, []),
        ("training/contrastive", TESTS, []),
        ("training/mteb_only", TESTS, []),
        ("training/distill", ([], []), [DEV]),
        ("training/mixed", ([], []), [DEV]),
        ("minilm/quickstart", TESTS, STUDY[:2]),
        ("quality/distill", TESTS, STUDY),
        ("quality/supervised", TESTS, STUDY),
    ],
)
def test_what_the_shipped_configurations_train_on_and_evaluate(name, tests, expected, monkeypatch):
    """As their files and data/README.md say; those that say nothing evaluate nothing of it."""
    monkeypatch.chdir(ROOT)
    config = load_config([ROOT / f"configs/{name}.yaml"])
    tasks = [t for s in config.data.eval if s.kind == "beir" for t in [beir_task(s.path, s.split)]]
    tasks += find_tasks(*tests) if any(tests) else []
    keys = {
        source.name: np.array(sorted(map(text_key, training_texts(source))), np.uint64)
        for source in config.data.train
    }
    monkeypatch.setattr(held_out, "build_corpus", lambda source, *_: Mock(keys=keys[source.name]))
    config.data.on_trained_eval = "warn"
    found: list[str] = []
    monkeypatch.setattr(held_out.log, "warning", lambda _, text: found.append(text))
    check_held_out(config, None, {task.name: task for task in tasks})
    assert [text.partition(" are trained on too")[0] for text in found] == expected
    allowed = load_config([ROOT / f"configs/{name}.yaml"]).data.on_trained_eval
    assert allowed == ("warn" if DEV in expected else "error")


@lru_cache
def training_texts_of(path: str, kind: str, split: str) -> set[str]:
    source = SourceConfig(name="x", kind=kind, path=path, split=split, mined_negatives=1)
    return {text for row in source_reader(source, Config())(BadRows()) for text in row.words}


def training_texts(source: SourceConfig) -> set[str]:
    return training_texts_of(source.path, source.kind, source.split)


def test_large_caches_are_read_piece_by_piece(monkeypatch):
    keys = np.arange(0, 1000, 3, dtype=np.uint64)
    wanted = np.array([[0, 999], [4, 6], [2**64 - 1, 500]], np.uint64)
    expected = [[True, True], [False, True], [False, False]]
    for chunk in (1, 7, 5000):
        monkeypatch.setattr(held_out, "CHUNK", chunk)
        assert find_keys(wanted, keys).tolist() == expected
    assert not find_keys(wanted, keys[:0]).any()
