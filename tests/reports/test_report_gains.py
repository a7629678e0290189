import pytest

from bge_pruning.reports.tables import count_parts, render_bytes, render_gains, share


def text(inputs):
    return "\n\n".join(render_gains(inputs))


def test_parameters_size_memory_and_speed(inputs):
    said = text(inputs)
    assert "| encoder | 4,000,000 | 2,000,000 | 50.0% |" in said
    assert "| heads | 0 | 0 | - |" in said
    assert "| weights on disk | 28.0 MB | 20.0 MB | 71.4% |" in said
    assert "| memory of weights | 28.0 MB | 20.0 MB | 71.4% |" in said
    assert "| memory of activations | 12.0 MB | 5.00 MB | 41.7% |" in said
    assert "while 32 texts of up to 128 tokens are embedded" in said
    assert "| one text, median | 5.0 ms | 5.0 ms | 0.50 (0.40 to 0.62) |" in said
    assert "100 texts/s | 180 texts/s | 1.80 (1.70 to 1.90) |" in said
    assert "on cpu, 2 threads; in brackets" in said


def test_what_was_not_measured(inputs):
    inputs.evaluation.update(speed=None, size_bytes={"model": None, "baseline": None})
    said = text(inputs)
    assert "Speed: not measured." in said
    assert "on disk" not in said and "memory" not in said
    del inputs.evaluation["size_bytes"]
    assert "on disk" not in text(inputs)


def test_one_size_alone_is_shown_without_a_share(inputs):
    inputs.evaluation["size_bytes"]["baseline"] = None
    assert "| weights on disk | - | 20.0 MB | - |" in text(inputs)


def test_counts_come_from_the_extraction_or_else_from_the_evaluation(inputs):
    assert list(count_parts(inputs)) == ["original", "pruned"]
    inputs.pruning = None
    assert list(count_parts(inputs)) == ["original", "pruned"]
    inputs.evaluation["parameters"]["baseline"] = None
    assert list(count_parts(inputs)) == ["pruned"]
    assert "| parameters | pruned |\n" in text(inputs)
    inputs.evaluation = None
    assert count_parts(inputs) == {} and render_gains(inputs) == []


def test_a_device_is_shown_as_it_is(inputs):
    inputs.evaluation["speed"]["device"] = "<GPU>"
    inputs.evaluation["speed"]["threads"] = 1
    assert r"on \<GPU\>, 1 thread;" in text(inputs)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (None, "-"),
        (0, "0.00 kB"),
        (1234, "1.23 kB"),
        (62_000_000, "62.0 MB"),
        (999_000_000, "999 MB"),
        (2_271_000_000, "2.27 GB"),
    ],
)
def test_bytes(size, said):
    assert render_bytes(size) == said


def test_share():
    assert share(4, 1) == "25.0%"
    assert share(0, 1) == share(None, 1) == share(4, None) == "-"
