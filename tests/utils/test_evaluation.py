"""Results files."""

import json
import os
import platform
from pathlib import Path

import pytest

from bge_pruning.utils import environment
from bge_pruning.utils.environment import collect_versions, describe_machine
from bge_pruning.utils.files import evaluation_files, refuse_existing, write_json, write_text


def test_the_machine_is_named_without_its_host(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name : Some CPU @ 2 GHz\nmodel name : Some CPU @ 2 GHz\n")
    monkeypatch.setattr(environment, "CPU", file)
    cores = os.cpu_count()
    assert describe_machine() == {"cpu": "Some CPU @ 2 GHz", "cores": cores, "gpu": None}
    file.unlink()
    assert describe_machine() == {"cpu": platform.machine(), "cores": cores, "gpu": None}


def test_existing_file_is_kept(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json({"value": 1}, path)
    with pytest.raises(FileExistsError, match=r"results\.json exists.*--overwrite"):
        write_json({"value": 2}, path)
    assert json.loads(path.read_text()) == {"value": 1}
    write_json({"value": 2}, path, overwrite=True)
    assert json.loads(path.read_text()) == {"value": 2}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"value": float("nan")}, path, overwrite=True)
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_json_is_readable_in_every_language(tmp_path):
    write_json({"текст": "天气"}, tmp_path / "a.json")
    content = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert content == '{\n  "текст": "天气"\n}\n'


def test_a_text_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "first")

    def fill_the_disk(path, text, **_):
        with path.open("w") as stream:
            stream.write(text[:2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "first"


def test_the_first_file_that_exists_is_named(tmp_path):
    (tmp_path / "b").touch()
    with pytest.raises(FileExistsError, match="b exists. To fix, choose another name or pass"):
        refuse_existing([tmp_path / "a", tmp_path / "b"], overwrite=False)
    refuse_existing([tmp_path / "a", tmp_path / "b"], overwrite=True)


def test_what_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder. To fix, name a file"):
        refuse_existing([tmp_path], overwrite=True)
    (tmp_path / "file").touch()
    message = "b.json cannot be written: .*/file is not a folder that may be written to. To fix"
    with pytest.raises(PermissionError, match=message):
        refuse_existing([tmp_path / "file" / "a" / "b.json"], overwrite=False)
    refuse_existing([tmp_path / "new" / "a" / "b.json"], overwrite=False)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="a.json cannot be written: .* To fix, choose ano"):
        refuse_existing([tmp_path / "a.json"], overwrite=False)


def test_the_table_of_an_evaluation_has_another_name():
    assert evaluation_files("a/b.json") == (Path("a/b.json"), Path("a/b.md"))
    assert evaluation_files("a/b") == (Path("a/b"), Path("a/b.md"))
    with pytest.raises(ValueError, match=r"b\.md is to hold JSON, .* To fix, write a/b\.json"):
        evaluation_files("a/b.md")
    with pytest.raises(ValueError, match="'.' names no file. To fix, write e.g. evaluation.json"):
        evaluation_files("")


def test_versions_are_those_of_the_libraries():
    import mteb
    import torch

    versions = collect_versions()
    assert versions["mteb"] == mteb.__version__
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
