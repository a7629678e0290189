"""Licence and hub name of a model, from cards as people write them, and quiet loading."""

import gc
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from bge_pruning.model_io.example_models import MINILM
from bge_pruning.model_io.hub import (
    Origin,
    _matters,
    display_name,
    hub_name,
    no_loading_bars,
    quick_loading,
    read_origin,
)
from bge_pruning.utils.records import Source


@pytest.fixture
def write_card(tmp_path):
    """A function that writes the card of a folder, with this at its head."""

    def write(front: str, rest: str = "# A model\n") -> Path:
        text = f"---\n{front}---\n{rest}" if front else rest
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_a_model_of_the_hub(write_card, messages):
    folder = write_card("license: mit\npipeline_tag: sentence-similarity\n")
    assert read_origin(folder, "BAAI/bge-m3") == Origin("mit", "BAAI/bge-m3")
    assert not messages.records


def test_hub_names_and_folders(write_card, monkeypatch):
    folder = write_card("license: apache-2.0\nbase_model: owner/model-1.0\n")
    assert read_origin(folder, str(folder)) == Origin("apache-2.0", "owner/model-1.0")
    write_card("license: [cc-by-4.0]\nbase_model:\n- owner/model\n")  # a list of one
    assert read_origin(folder, str(folder)) == Origin("cc-by-4.0", "owner/model")
    # A fine-tuned model on the hub names the one that it was made from.
    assert read_origin(folder, "owner/tuned") == Origin("cc-by-4.0", "owner/tuned")
    folder = write_card("license: mit\n")
    (folder / "BAAI" / "bge-m3").mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert read_origin(folder, "BAAI/bge-m3") == Origin("mit", None)
    folder = write_card("", MINILM.card())
    assert read_origin(folder, str(folder)) == Origin("apache-2.0", MINILM.name)


NO_HUB_NAMES = ("../a folder", "[a/b, c/d]", "{a: b}", "7", "''", "https://huggingface.co/a/b")


@pytest.mark.parametrize(
    "front",
    ["", "language: de\n", "license:\nbase_model:\n", "# nothing\n"]
    + [f"base_model: {base}\n" for base in NO_HUB_NAMES],
)
def test_a_card_that_names_neither_licence_nor_base(front, write_card, messages):
    folder = write_card(front)
    assert read_origin(folder, str(folder)) == Origin()
    (folder / "README.md").unlink()
    assert read_origin(folder, str(folder)) == Origin()
    assert not messages.records


@pytest.mark.parametrize("front", ["license: [mit\n", "a: b: c\n", "- mit\n", "just text\n"])
def test_damaged_metadata_is_a_warning(front, write_card, messages, tmp_path):
    assert read_origin(write_card(front), "owner/model") == Origin(None, "owner/model")
    (record,) = messages.records
    assert record.levelname == "WARNING"
    assert "README.md: the metadata of the model card cannot be read (" in record.getMessage()
    assert "\n" not in record.getMessage()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")  # no text
    assert read_origin(tmp_path, "owner/model") == Origin(None, "owner/model")
    assert messages.text.count("the metadata of the model card cannot be read (") == 2


@pytest.mark.parametrize("value", ["7", "[mit, apache-2.0]", "{a: b}", "two words", "'a\nb'"])
def test_a_licence_that_is_none_is_a_warning(value, write_card, messages):
    folder = write_card(f"license: {value}\n")
    assert read_origin(folder, str(folder)) == Origin()
    assert "README.md: license is " in messages.text
    assert ", expected one identifier such as mit" in messages.text


@pytest.mark.parametrize(
    ("source", "name", "shown"),
    [
        ({"base_model": "a/b"}, "a/b", "a/b"),  # of before there was an origin
        ({"base_model": "a/b", "origin": None}, "a/b", "a/b"),
        ({"base_model": "a/b", "origin": "a/b"}, "a/b", "a/b"),
        ({"base_model": "/x/y z", "origin": "a/b"}, "a/b", "a/b"),
        ({"base_model": "/x/y z", "origin": None}, None, "y z"),
        ({"base_model": "here/folder", "origin": None}, None, "folder"),
    ],
)
def test_names_of_a_record(source, name, shown, tmp_path, monkeypatch):
    (tmp_path / "here" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name(Source(**source)) == name
    assert display_name(Source(**source)) == shown


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("bars", [True, False])
def test_bars_and_collector_come_back(collects, bars):
    """What is switched off while a model loads is on again afterwards."""
    before = gc.isenabled(), hf_logging.is_progress_bar_enabled()
    try:
        (gc.enable if collects else gc.disable)()
        (hf_logging.enable_progress_bar if bars else hf_logging.disable_progress_bar)()
        with quick_loading():
            assert not gc.isenabled() and not hf_logging.is_progress_bar_enabled()
        assert (gc.isenabled(), hf_logging.is_progress_bar_enabled()) == (collects, bars)
        with pytest.raises(ZeroDivisionError), quick_loading():
            _ = 1 / 0
        assert (gc.isenabled(), hf_logging.is_progress_bar_enabled()) == (collects, bars)
        with no_loading_bars():
            assert gc.isenabled() == collects
    finally:
        (gc.enable if before[0] else gc.disable)()
        (hf_logging.enable_progress_bar if before[1] else hf_logging.disable_progress_bar)()


def test_a_report_of_weights_matters_if_some_are_missing(electra_folder, tmp_path, caplog):
    from transformers import ElectraModel

    logger = logging.getLogger("transformers")
    folder = shutil.copytree(electra_folder, tmp_path / "electra")
    weights = load_file(folder / "model.safetensors")

    def said(change: dict) -> str:
        save_file(weights | change, folder / "model.safetensors", metadata={"format": "pt"})
        caplog.clear()
        logger.addHandler(caplog.handler)
        with no_loading_bars():
            ElectraModel.from_pretrained(folder)
        logger.removeHandler(caplog.handler)
        return caplog.text

    assert said({"a.head": torch.zeros(1)}) == ""
    weights.pop("embeddings.word_embeddings.weight")
    assert "MISSING" in said({})


def test_a_pooler_that_is_missing_is_not_worth_a_line():
    head = "Model LOAD REPORT from: m\nKey | Status |\n----+----+-\n"
    notes = "\nNotes:\n- MISSING: those params were newly initialized."
    for row, matters in (("pooler.dense.bias | MISSING |", False), ("a.bias | MISSING |", True)):
        report = logging.LogRecord("x", logging.WARNING, "", 1, head + row + notes, None, None)
        assert _matters(report) == matters
