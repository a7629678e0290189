"""What is switched off while a model loads is on again afterwards."""

import gc

import pytest
from transformers.utils import logging

from bge_pruning.model_io.hub import no_loading_bars, quick_loading


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("bars", [True, False])
def test_bars_and_collector_come_back(collects, bars):
    before = gc.isenabled(), logging.is_progress_bar_enabled()
    try:
        (gc.enable if collects else gc.disable)()
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        with quick_loading():
            assert not gc.isenabled() and not logging.is_progress_bar_enabled()
        assert (gc.isenabled(), logging.is_progress_bar_enabled()) == (collects, bars)
        with pytest.raises(ZeroDivisionError), quick_loading():
            _ = 1 / 0
        assert (gc.isenabled(), logging.is_progress_bar_enabled()) == (collects, bars)
        with no_loading_bars():
            assert gc.isenabled() == collects
    finally:
        (gc.enable if before[0] else gc.disable)()
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()
