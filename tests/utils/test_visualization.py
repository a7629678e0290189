import subprocess
import sys

from bge_pruning.utils import visualization


def test_every_picture_is_named():
    for name in visualization.__all__:
        assert hasattr(visualization, name)
    drawn = {name for name in vars(visualization) if name.startswith("draw_")}
    assert drawn <= set(visualization.__all__)


def test_the_global_backend_is_not_touched(tmp_path):
    code = (
        "import sys; import bge_pruning.utils.visualization as v; "
        "assert 'matplotlib' not in sys.modules; import numpy as np; "
        "figure = v.draw_gates({'layer': np.ones(2)}, {}, v.DARK); "
        f"v.save_figure(figure, {str(tmp_path / 'x.png')!r}, v.DARK); "
        "v.render_svg(figure, v.DARK); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
