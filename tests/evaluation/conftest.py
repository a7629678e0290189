"""A model that texts are embedded with."""

import pytest

from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.model_io.pretrained import load_base_model


@pytest.fixture(scope="session")
def encoder(model_folder) -> TextEncoder:
    """Do not change it."""
    return TextEncoder(load_base_model(str(model_folder)), batch_size=2)
