"""Libraries of extras."""

import sys

import pytest

from bge_pruning.utils.guard import import_optional


def test_what_is_installed_is_imported():
    import json.decoder

    assert import_optional("json.decoder", "none") is json.decoder


@pytest.mark.parametrize("name", ["nowhere_at_all", "nowhere_at_all.inside"])
def test_what_is_missing_is_named_with_its_extra(name):
    message = r"^nowhere_at_all is not installed, and .* To fix, pip install -e '\.\[onnx\]'$"
    with pytest.raises(ImportError, match=message):
        import_optional(name, "onnx")


def test_a_library_that_lacks_another_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'nowhere_at_all'$"):
        import_optional("half_installed", "onnx")
    assert "half_installed" not in sys.modules
