"""How sure a mean score is: 95 % confidence intervals."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from megatron_solopo.evaluation_results import Interval

_TAIL = 0.025
_Z = NormalDist().inv_cdf(1 - _TAIL)
_RESAMPLES = 2_000
_SEED = 0


class Estimate(NamedTuple):
    """A mean of scores and its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    interval: Interval


def estimate(scores: Sequence[float]) -> Estimate:
    """The mean of at least one score in [0, 1].

    Scores of 0 and 1 alone get Wilson's score interval (Wilson 1927, without continuity correction). Others get the
    percentiles of 2,000 bootstrap means (Efron 1979), always the same for the same scores. Where all are equal a
    bootstrap says nothing, and they get Wilson's too: it takes the variance of a proportion, the largest that scores
    in [0, 1] of this mean can have, and is too wide rather than too narrow.
    """
    values = np.asarray(scores, dtype=np.float64)
    assert len(values) and values.min() >= 0 and values.max() <= 1, "scores are in [0, 1]"
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all() or np.ptp(values) == 0:
        return Estimate(mean, *_wilson(mean, len(values)), "wilson")
    draws = np.random.default_rng(_SEED).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (_TAIL, 1 - _TAIL))
    return Estimate(mean, float(low), float(high), "bootstrap")


def _wilson(mean: float, count: int) -> tuple[float, float]:
    centre = mean + _Z**2 / (2 * count)
    margin = _Z * (mean * (1 - mean) / count + _Z**2 / (4 * count**2)) ** 0.5
    scale = 1 + _Z**2 / count
    # At a mean of 0 or 1 the interval ends there, but for rounding.
    return min(mean, (centre - margin) / scale), max(mean, (centre + margin) / scale)
