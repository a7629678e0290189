"""Checks of values that are to be correlated; the correlations are mteb's and scipy's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def check_spread(name: str, values: np.ndarray) -> None:
    """Refuse what ``scipy`` would turn into a silent NaN.

    Args:
        name: What the values are, for the message.
        values: Shape ``(n,)``.

    Raises:
        ValueError: If a value is not finite, or all are the same: no correlation is defined.
    """
    import numpy as np

    if not np.isfinite(values).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} values of the {name} are "
            "not finite. To fix, look for NaN or infinity in the weights or the data."
        )
    if np.ptp(values) == 0:
        raise ValueError(
            f"every {name} is {values[0]:g}, so the correlation is undefined. To fix, check that "
            "the tokenizer belongs to the model and that the file holds different scores."
        )
