import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bge_pruning.utils import visualization
from bge_pruning.utils.visualization import plot_gates, plot_sparsity, plot_summary

SHAPES = {"head": (4, 3), "intermediate": (4, 24), "layer": (4,), "hidden": (16,)}


@pytest.fixture
def gates():
    rng = np.random.default_rng(0)
    return {axis: rng.uniform(size=shape) for axis, shape in SHAPES.items()}


@pytest.fixture
def kept(gates):
    return {
        axis: values >= np.median(values, axis=-1, keepdims=True) for axis, values in gates.items()
    }


@pytest.fixture
def figures(monkeypatch):
    """Figures that were saved, to look at what they hold."""
    saved = []
    for module in (visualization, sys.modules["bge_pruning.utils.summary_plot"]):
        save = module.save_figure

        def spy(figure, path, save=save):
            saved.append(figure)
            save(figure, path)

        monkeypatch.setattr(module, "save_figure", spy)
    return saved


def history():
    rows = [{"batch": 0, "metrics": {"loss/train/total": 1.0}}]
    for batch in range(1, 40):
        target = min(0.5, batch / 40)
        metrics = {
            "pruning/expected_sparsity/head": target - 0.01,
            "pruning/target_sparsity/head": target,
            "pruning/lambda_1/head": 0.1,
            "loss/train/distillation_alignment": 1 / batch,
        }
        rows.append({"batch": batch, "metrics": metrics})
    rows.append({"batch": 40, "metrics": {"pruning/realised_sparsity/head": 0.5}})
    rows.append({"batch": 20, "metrics": {"metrics/dev/SpearmanCorrCoef": 0.8}})
    return rows


def evaluation(*, tasks=1, speed=True, baseline=True):
    task = {
        "task": "dev",
        "value": 0.8,
        "baseline": 0.9 if baseline else None,
        "floor": 0.5,
        "retention": 0.8 / 0.9 if baseline else None,
        "also": {"before recovery": 0.7},
    }
    counts = {"encoder": 4_000_000, "embeddings": 3_000_000, "pooler": 9, "heads": 0}
    counts["total"] = sum(counts.values())
    ratios = {"ratio": 2.0, "ratio_iqr": [1.8, 2.1]}
    latency = {"model": {"median": 5.0}, "baseline": {"median": 9.0}, "ratio": 0.5}
    measured = {
        "device": "cpu",
        "threads": 2,
        "latency_ms": {**latency, "ratio_iqr": [0.4, 0.6]},
        "throughput_texts_per_s": {"model": 200.0, "baseline": 100.0, **ratios},
    }
    return {
        "tasks": [task] * tasks,
        "parameters": {"model": counts, "baseline": counts if baseline else None},
        "speed": measured if speed else None,
    }


def texts(figure):
    import matplotlib.text

    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize(
    "axes", [list(SHAPES), ["head", "intermediate"], ["layer"], ["hidden"], ["head", "hidden"]]
)
def test_gates_draw_any_subset_of_axes(axes, gates, kept, tmp_path):
    path = tmp_path / "new" / "gates.png"
    plot_gates({axis: gates[axis] for axis in axes}, {axis: kept[axis] for axis in axes}, path)
    with Image.open(path) as image:
        assert image.info["dpi"][0] >= 150
    assert [file.name for file in path.parent.iterdir()] == ["gates.png"]


def test_gates_say_what_was_kept(gates, kept, figures, tmp_path):
    kept["layer"] = np.array([True, False, True, True])
    kept["head"][1] = True  # the gates of a removed layer are not counted
    plot_gates(gates, kept, tmp_path / "gates.png")
    said = texts(figures[0])
    assert "Layers kept:\n3 of 4" in said
    assert "Attention heads kept: 2 of 3 per layer" in said
    assert "Intermediate units kept: 12 of 24 per layer" in said
    assert "Hidden dimensions kept: 8 of 16" in said
    assert said.count("layer removed") == 2


def test_uneven_layers_are_added_up(gates, kept, figures, tmp_path):
    kept["head"] = np.array([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=bool)
    plot_gates({"head": gates["head"]}, {"head": kept["head"]}, tmp_path / "gates.png")
    assert "Attention heads kept: 6 of 12" in texts(figures[0])


def test_gates_without_a_cut(gates, figures, tmp_path):
    plot_gates(gates, {}, tmp_path / "gates.png")
    assert "kept" not in texts(figures[0])


def test_units_are_sorted_in_each_row(gates, kept, figures, tmp_path):
    plot_gates({"intermediate": gates["intermediate"]}, {}, tmp_path / "gates.png")
    drawn = figures[0].axes[0].images[0].get_array()
    np.testing.assert_array_equal(drawn, -np.sort(-gates["intermediate"], axis=1))


def test_gates_that_make_no_sense(gates, tmp_path):
    path = tmp_path / "gates.png"
    with pytest.raises(ValueError, match=r"no gates to draw among \['width'\]"):
        plot_gates({"width": np.ones(3)}, {}, path)
    with pytest.raises(ValueError, match=r"gates of head have shape \(3,\), not 2 dimensions"):
        plot_gates({"head": np.ones(3)}, {}, path)
    with pytest.raises(ValueError, match=r"kept of layer has shape \(3,\), its gates \(4,\)"):
        plot_gates({"layer": gates["layer"]}, {"layer": np.ones(3, bool)}, path)
    for bad in (1.5, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"gates of layer are not in .* not log_alpha"):
            plot_gates({"layer": np.array([0.5, bad])}, {}, path)
    assert not path.exists()


def test_sparsity_has_a_panel_for_each_thing(figures, tmp_path):
    plot_sparsity(history(), tmp_path / "sparsity.png")
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    assert titles == ["Removed attention heads (%)", "Task loss", "Spearman while training"]
    said = texts(figures[0])
    assert "after the cut: 50.0 %" in said
    assert "distillation alignment" in said
    assert "total" not in said  # it holds the constraint too, and would hide the task's loss


def test_sparsity_lines_are_in_order_of_batch_and_in_percent(figures, tmp_path):
    plot_sparsity(list(reversed(history())), tmp_path / "sparsity.png")
    batches, percent = figures[0].axes[0].lines[0].get_data()
    assert list(batches) == list(range(1, 40))
    assert percent[19] == pytest.approx(49)


def test_sparsity_skips_what_is_not_finite(figures, tmp_path):
    rows = [{"batch": n, "metrics": {"loss/train/total": v}} for n, v in enumerate([1.0, np.nan])]
    plot_sparsity(rows, tmp_path / "sparsity.png")
    assert len(figures[0].axes) == 1


def test_sparsity_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="the history holds no sparsity, loss or Spearman"):
        plot_sparsity([{"batch": 1, "metrics": {"time/epoch": 1}}], tmp_path / "sparsity.png")


@pytest.mark.parametrize("tasks", [1, 4])
def test_summary_prints_the_numbers(tasks, figures, tmp_path):
    plot_summary(evaluation(tasks=tasks), tmp_path / "summary.png")
    said = texts(figures[0])
    for number in ("0.800", "0.900", "0.700", "88.9% kept", "7.0 M", "2.00 x", "9.0 to 5.0 ms"):
        assert number in said
    assert len(figures[0].axes) == 3


def test_summary_without_baseline_and_speed(figures, tmp_path):
    plot_summary(evaluation(speed=False, baseline=False), tmp_path / "summary.png")
    assert len(figures[0].axes) == 2
    assert "original" not in texts(figures[0])


def test_summary_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="the evaluation has no task to draw"):
        plot_summary({"tasks": []}, tmp_path / "summary.png")


def test_no_text_overlaps(figures, gates, kept, tmp_path):
    plot_summary(evaluation(tasks=4), tmp_path / "a.png")
    plot_sparsity(history(), tmp_path / "b.png")
    plot_gates(gates, kept, tmp_path / "c.png")
    for figure in figures:
        import matplotlib.text

        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in figure.findobj(matplotlib.text.Text)
            if text.get_text().strip() and text.get_visible() and text.axes is not None
        ]
        for index, (name, box) in enumerate(boxes):
            for other, its_box in boxes[:index]:
                assert not box.padded(-1).overlaps(its_box.padded(-1)), (name, other)


def test_the_global_backend_is_not_touched(tmp_path):
    code = (
        "import sys; import bge_pruning.utils.visualization as v; "
        "assert 'matplotlib' not in sys.modules; import numpy as np; "
        f"v.plot_gates({{'layer': np.ones(2)}}, {{}}, {str(tmp_path / 'x.png')!r}); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
