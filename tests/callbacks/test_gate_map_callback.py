from types import SimpleNamespace

import numpy as np
import pytest
from composer.utils import dist

from bge_pruning.callbacks.gate_map_callback import GateMapCallback
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module

SHAPE = EncoderShape(32, 4, 4, 64, 99, head_dim=8, max_position_embeddings=80)


@pytest.fixture
def logged():
    return []


@pytest.fixture
def logger(logged):
    return SimpleNamespace(log_images=lambda image, **where: logged.append((image, where)))


@pytest.fixture
def callback():
    return GateMapCallback(L0Module(SHAPE, ("head", "layer"), None, 18_000))


def test_an_image_of_the_gates(callback, logger, logged):
    callback.eval_after_all(None, logger)
    ((image, where),) = logged
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
    assert where == {"name": "gates", "channels_last": True, "use_table": False}


def test_other_ranks_draw_nothing(callback, logger, logged, monkeypatch):
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    callback.eval_after_all(None, logger)
    assert logged == []


@pytest.mark.usefixtures("failures_may_be_hidden")
def test_a_failure_does_not_end_the_training(callback, caplog):
    callback.eval_after_all(None, SimpleNamespace())
    assert "drawing the gates failed" in caplog.text
