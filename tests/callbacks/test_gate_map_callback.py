from types import SimpleNamespace

import numpy as np
import pytest
from composer.core import Time, Timestamp
from composer.utils import dist

from bge_pruning.callbacks.pruning_callback import GateMapCallback
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
    return GateMapCallback(L0Module(SHAPE, ("head", "layer"), None, 18_000), "4ba")


def at(batch: int) -> SimpleNamespace:
    """The end of a batch of a run of ten."""
    return SimpleNamespace(timestamp=Timestamp(batch=batch), max_duration=Time.from_batch(10))


def test_an_image_of_the_gates(callback, logger, logged):
    callback.batch_end(at(4), logger)
    ((image, where),) = logged
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
    assert where == {"name": "gates", "channels_last": True, "use_table": False}


@pytest.mark.parametrize("batch", [1, 3, 5, 9])
def test_nothing_between_the_evaluations(batch, callback, logger, logged):
    callback.batch_end(at(batch), logger)
    assert logged == []


def test_the_last_batch_is_drawn_too(callback, logger, logged):
    callback.batch_end(at(10), logger)
    assert len(logged) == 1


def test_other_ranks_draw_nothing(callback, logger, logged, monkeypatch):
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    callback.batch_end(at(4), logger)
    assert logged == []


@pytest.mark.usefixtures("failures_may_be_hidden")
def test_a_failure_does_not_end_the_training(callback, caplog):
    callback.batch_end(at(4), SimpleNamespace())
    assert "drawing the gates failed" in caplog.text
