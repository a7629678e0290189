"""What cannot be correlated."""

import numpy as np
import pytest

from bge_pruning.utils.embedding_metrics import check_spread


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad):
    values = np.array([0.1, bad, 0.3, bad])
    with pytest.raises(ValueError, match=r"2 of 4 values of the x are not finite\. To fix, look"):
        check_spread("x", values)


def test_values_that_are_all_the_same():
    with pytest.raises(ValueError, match="every x is 0.5, so the correlation is undefined. To fix"):
        check_spread("x", np.full(3, 0.5))


def test_values_that_differ():
    check_spread("x", np.array([0.1, 0.2]))
