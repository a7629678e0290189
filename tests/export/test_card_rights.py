"""Licence and citations."""

import re

import pytest

from bge_pruning.export.card_rights import render_rights

PAPERS = ("1712.01312", "2204.00408", "2310.06694")


def rights(base="BAAI/bge-m3", license_id="mit", origin=None) -> str:
    source = {"base_model": base, "revision": None, "license": license_id, "origin": origin}
    return "\n\n".join(render_rights(source))


@pytest.mark.parametrize("base", ["BAAI/bge-m3", "/models/m3", "owner/other"])
def test_the_papers_of_the_method_are_named(base):
    for number in PAPERS:
        assert f"(https://arxiv.org/abs/{number})" in rights(base)


def test_bge_m3():
    said = rights()
    assert "## Licence and citation" in said
    page = "[BAAI/bge-m3](https://huggingface.co/BAAI/bge-m3)"
    assert f"The licence of the original ({page}) applies: `mit`." in said
    (entry,) = re.findall(r"```bibtex\n(.*?)```", said, re.DOTALL)
    assert "eprint = {2402.03216}" in entry
    assert entry.count("{") == entry.count("}")


def test_a_folder_of_a_sentence_transformers_model():
    said = rights("/home/me/minilm", "apache-2.0", "sentence-transformers/all-MiniLM-L6-v2")
    assert "applies: `apache-2.0`." in said and "/home/me" not in said
    (entry,) = re.findall(r"```bibtex\n(.*?)```", said, re.DOTALL)
    assert "https://arxiv.org/abs/1908.10084" in entry
    assert entry.count("{") == entry.count("}")


def test_another_model_is_linked():
    said = rights("intfloat/multilingual-e5-small")
    page = "https://huggingface.co/intfloat/multilingual-e5-small"
    assert f"Cite the original as [intfloat/multilingual-e5-small]({page}) asks." in said
    assert "bibtex" not in said


def test_a_folder_without_a_name():
    said = rights("/home/me/secret", None)
    assert "The licence of the original applies; its identifier was not known" in said
    assert "secret" not in said and "Cite" not in said


def test_a_licence_of_its_own():
    assert "applies; it is one of its own." in rights(license_id="other")
