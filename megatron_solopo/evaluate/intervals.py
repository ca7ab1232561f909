"""95 % confidence intervals."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.report.preference_results import Estimate

_Z = NormalDist().inv_cdf(0.975)


def proportion(hits: NDArray[np.bool_]) -> Estimate:
    """Share of hits, with Wilson's score interval (1927), which stays inside [0, 1] and is honest near its ends."""
    count, share = len(hits), float(np.mean(hits))
    center = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return Estimate(mean=share, low=max(0.0, center - half), high=min(1.0, center + half))


def mean(values: NDArray[np.float64]) -> Estimate:
    """Mean, with the normal interval of its standard error; a single value has no spread, and no width."""
    center = float(np.mean(values))
    half = _Z * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(mean=center, low=center - half, high=center + half)
