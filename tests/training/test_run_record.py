"""What a run was made from is in its folder, and a resumed run says what has changed."""

import json
import logging
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bge_pruning.config.schema import Config, SourceConfig
from bge_pruning.datasets.text_files import hash_file
from bge_pruning.training import run_record, sources
from bge_pruning.training.run_record import find_revision, read_starts
from bge_pruning.training.sources import fingerprint_source
from bge_pruning.utils.records import Code, Start
from tests.common.data import write_parallel

VERSIONS = {"python": "3.11.7", "torch": "2.7.0"}


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """Messages reach caplog, whatever a test before has set up."""
    monkeypatch.setattr(logging.getLogger("bge_pruning"), "propagate", True)


def git(folder: Path, *arguments: str) -> None:
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *name, *arguments]
    subprocess.run(command, check=True, capture_output=True)


def test_every_run_has_its_record(tmp_path, train_tiny, sts_csv, caplog):
    run = train_tiny(tmp_path, "max_duration=1ba")
    (start,) = json.loads((run / "run.json").read_text())["starts"]
    assert (start["seed"], start["ranks"]) == (3, 1)
    assert {"python", "torch", "mosaicml", "transformers"} <= start["versions"].keys()
    files = {str(sts_csv): hash_file(sts_csv)}
    assert start["data"] == {"train": {"train": files}, "eval": {"dev": files}}
    assert set(start) == {"time", "command", "seed", "ranks", "versions", "code", "data"}
    with caplog.at_level(logging.WARNING):
        train_tiny(tmp_path, "max_duration=2ba", "autoresume=true")
    assert not any("other circumstances" in message for message in caplog.messages)


def test_what_has_changed_is_warned_of_and_not_refused(tmp_path, train_tiny, sts_csv, caplog):
    data = tmp_path / "mine.csv"
    shutil.copy(sts_csv, data)
    source = f"data.eval=[{{name: mine, kind: sts, path: {data}}}]"
    train_tiny(tmp_path, source, "max_duration=2ba")
    data.write_text("\n".join(data.read_text().splitlines()[:-1]) + "\n")
    with caplog.at_level(logging.WARNING):
        run = train_tiny(tmp_path, source, "max_duration=4ba", "autoresume=true")
    (message,) = [m for m in caplog.messages if "other circumstances" in m]
    assert f"data eval mine {data} was " in message
    assert "To fix, put them back, or start again (overwrite=true)" in message
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert len(starts) == 2
    assert "other circumstances" in (run / "train.log").read_text()


def test_without_a_checkpoint_there_is_nothing_to_resume(configure, caplog):
    config = configure()
    with caplog.at_level(logging.WARNING):
        run_record.record_start(config, VERSIONS, 1)
        run_record.record_start(config, {**VERSIONS, "torch": "2.11.0"}, 1)
        assert caplog.messages == []
        (Path(config.run_folder) / "ba2-rank0.pt").touch()
        run_record.record_start(config, VERSIONS, 2)
    (message,) = caplog.messages
    assert "versions torch was 2.11.0 and is 2.7.0" in message
    assert "ranks was 1 and is 2" in message
    assert len(read_starts(Path(config.run_folder) / "run.json")) == 3


def test_circumstances_that_may_differ_and_that_may_not(caplog):
    before = Start(
        time="1", command=["a"], seed=3, ranks=1, versions={}, code=None, data={"train": {}}
    )
    with caplog.at_level(logging.WARNING):
        run_record.warn_of_changes(
            before, before.model_copy(update={"time": "2", "command": ["b"]})
        )
        assert caplog.messages == []
        code = Code(revision="abc", changed=False)
        run_record.warn_of_changes(before, before.model_copy(update={"code": code}))
    assert "code was None and is not there; code revision was not there and is abc" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", '{"starts": 3}', "{}"])
def test_a_damaged_record_is_begun_anew(content, tmp_path, caplog):
    (tmp_path / "run.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert read_starts(tmp_path / "run.json") == []
    assert "run.json cannot be read" in caplog.text and "is begun anew." in caplog.text


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A git checkout with the package's first file."""
    folder = tmp_path / "checkout"
    (folder / "bge_pruning").mkdir(parents=True)
    (folder / "bge_pruning" / "__init__.py").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_the_code_is_looked_for_where_it_is():
    assert (run_record.ROOT / "bge_pruning" / "training" / "run_record.py").samefile(
        run_record.__file__
    )


def test_revision_of_a_checkout(checkout, monkeypatch):
    found = find_revision(checkout)
    assert len(found.revision) == 40
    assert found.changed is False
    (checkout / "notes.txt").write_text("not of the package")
    assert find_revision(checkout) == found
    (checkout / "bge_pruning" / "__init__.py").write_text("x = 1\n")
    assert find_revision(checkout) == Code(revision=found.revision, changed=True)
    inside = checkout / "venv" / "site-packages"  # installed inside of another checkout
    (inside / "bge_pruning").mkdir(parents=True)
    (inside / "bge_pruning" / "__init__.py").write_text("")
    assert find_revision(inside) is None
    monkeypatch.setenv("PATH", "")
    assert find_revision(checkout) is None


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (None, "code unknown revision"),
        ({"revision": "a" * 40, "changed": False}, f"code revision {'a' * 12};"),
        ({"revision": "a" * 40, "changed": True}, f"{'a' * 12} with uncommitted changes;"),
    ],
)
def test_the_line(code, text, configure, monkeypatch):
    monkeypatch.setattr(run_record, "find_revision", lambda _: code)
    config = configure()
    line = run_record.describe(run_record.build_record(config, VERSIONS, 2), config)
    assert text in line
    assert "seed 3, ranks 2" in line and line.endswith("python 3.11.7, torch 2.7.0")


def test_a_collection_and_a_pattern_are_their_files(collection, tmp_path, monkeypatch):
    source = SourceConfig(name="c", kind="beir", path=str(collection), split="test")
    names = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
    expected = {str(collection / name): hash_file(collection / name) for name in names}
    assert fingerprint_source(source, Config()) == expected
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}\n")
    source = SourceConfig(name="s", kind="sentences", path=str(tmp_path / "*.txt"))
    found = fingerprint_source(source, Config())
    assert list(found) == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert len(set(found.values())) == 2
    # Data sets have a name of their own.
    monkeypatch.setattr(sources.mteb, "mteb_fingerprint", lambda *task: " ".join(map(str, task)))
    monkeypatch.setattr(sources, "fingerprint_table", lambda table: f"print of {table.path}")
    task = SourceConfig(name="m", kind="mteb", path="SciFact", split="test")
    assert fingerprint_source(task, Config()) == {"SciFact": "SciFact test None"}
    hub = SourceConfig(name="h", kind="sts", path="hf://a/b")
    assert fingerprint_source(hub, Config()) == {"hf://a/b": "print of hf://a/b"}


def test_what_is_chosen_of_files_is_known_and_their_folder_is_not(tmp_path, monkeypatch):
    """The same data elsewhere are the same; other lines or languages of them are not."""
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_parallel(tmp_path / name, de="eins/zwei", en="one/two")
        monkeypatch.setenv("BGE_PRUNING_DATA", f"{tmp_path / name}/")
        path = "${oc.env:BGE_PRUNING_DATA}/news-{language}.txt.gz"
        source = SourceConfig("a", "parallel", path, languages=["de-en"], lines=":-1")
        found.append(fingerprint_source(source, Config()))
    assert found[0] == found[1]
    files = {f"{path.replace('{language}', name)}" for name in ("de", "en")}
    assert found[0].keys() == {*files, "languages", "lines"}
    others = replace(source, lines=":1"), replace(source, languages=["en-de"])
    assert all(fingerprint_source(other, Config()) != found[0] for other in others)
    texts = SourceConfig("a", "sentences", str(tmp_path / "first" / "*.gz"), lines=":1")
    assert fingerprint_source(texts, Config())["lines"] == ":1"
    assert "lines" not in fingerprint_source(replace(texts, lines=None), Config())
