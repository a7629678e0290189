"""Loading models with transformers without its progress bars, and without pauses."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Switch transformers' progress bars off; a model of this size loads in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def quick_loading() -> Iterator[None]:
    """The same without Python's garbage collector.

    A tokenizer of 250,002 tokens is read as as many lists, and the collector would look at all of
    them again and again: that takes longer than the reading.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with no_loading_bars():
            yield
    finally:
        if collects:
            gc.enable()
