"""95 % confidence intervals of what is counted and what is measured over triplets."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.evaluate.statistics import estimate
from megatron_solopo.report.preference_results import Estimate

_GRID = 100_001
_FAR = 40.0


def proportion(hits: NDArray[np.bool_]) -> Estimate:
    """Share of hits, with Wilson's score interval, which stays inside [0, 1] and is honest near its ends."""
    share, low, high, _ = estimate(hits.astype(np.float64).tolist())
    return Estimate(mean=share, low=low, high=high)


def mean(values: NDArray[np.float64]) -> Estimate:
    """Mean, with Student's interval of its standard error; a single value says nothing of its spread, and has none."""
    center = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean=center, low=None, high=None)
    half = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean=center, low=center - half, high=center + half)


@lru_cache
def student_t(degrees: int) -> float:
    """The 97.5th percentile of Student's t; degrees of freedom, at least 1.

    With t = sqrt(degrees) tan(angle) the density of the angle is cos(angle) ** (degrees - 1), which is summed over the
    half of it above 0 by the trapezoidal rule, as far as there is any: 95 % of that lies below the percentile.
    """
    angles = np.linspace(0.0, min(math.pi / 2, _FAR / math.sqrt(degrees)), _GRID)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(degrees) * math.tan(float(np.interp(0.95 * below[-1], below, angles)))
