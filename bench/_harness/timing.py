"""Summary statistics of the times measured with ``fastgpt.timing``."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of a measured quantity."""

    median: float
    p10: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """The Spread of the values. Raises ValueError if there are none."""
    if not values:
        raise ValueError("values must hold at least one measurement, got none")
    median, p10, p90 = np.percentile(values, [50, 10, 90])
    return Spread(float(median), float(p10), float(p90))


def rate(ms: Spread, amount: float) -> Spread:
    """``amount`` per second if it takes ``ms`` milliseconds. The 90th percentile of the times gives
    the 10th of the rates."""
    return Spread(1e3 * amount / ms.median, 1e3 * amount / ms.p90, 1e3 * amount / ms.p10)
