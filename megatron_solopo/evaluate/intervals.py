"""95 % confidence intervals of what is counted and what is measured over triplets."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.evaluate.statistics import estimate
from megatron_solopo.report.preference_results import Estimate

_Z = NormalDist().inv_cdf(0.975)


def proportion(hits: NDArray[np.bool_]) -> Estimate:
    """Share of hits, with Wilson's score interval, which stays inside [0, 1] and is honest near its ends."""
    share, low, high, _ = estimate(hits.astype(np.float64).tolist())
    return Estimate(mean=share, low=low, high=high)


def mean(values: NDArray[np.float64]) -> Estimate:
    """Mean, with the normal interval of its standard error; a single value has no spread, and no width."""
    center = float(np.mean(values))
    half = _Z * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(mean=center, low=center - half, high=center + half)
