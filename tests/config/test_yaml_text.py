"""What YAML may cost before it is parsed."""

import pytest

from bge_pruning.config.load import MAX_DEPTH, MAX_VALUES, YamlTextError, check_yaml


@pytest.mark.parametrize(
    "text",
    ["", "a: 1\n", "- [1, {b: c}]\n", "x: &x [1, 2]\ny: *x\n", "[" * MAX_DEPTH + "]" * MAX_DEPTH],
)
def test_ordinary_text_passes(text):
    check_yaml(text)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused_not_parsed(opening):
    """The C parser would end the process."""
    with pytest.raises(YamlTextError, match=f"nested more than {MAX_DEPTH} levels deep"):
        check_yaml(opening * 100_000)


def test_anchors_that_multiply_are_refused():
    lines = ["a0: &a0 [" + ", ".join("x" * 10) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 30)]
    with pytest.raises(YamlTextError, match=f"holds more than {MAX_VALUES:,} values") as caught:
        check_yaml("\n".join(lines))
    assert caught.value.line < 8


def test_an_unknown_alias_is_left_to_the_parser():
    check_yaml("a: *b\n")


@pytest.mark.parametrize(("text", "line"), [("a: 1\nb: [\n", 3), ("\x00", None)])
def test_no_yaml(text, line):
    with pytest.raises(YamlTextError) as caught:
        check_yaml(text)
    assert caught.value.line == line
    assert len(str(caught.value).splitlines()) == 1
