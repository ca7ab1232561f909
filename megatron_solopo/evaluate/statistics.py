"""How sure a mean score is: 95 % confidence intervals.

95 % confidence intervals of what is counted and what is measured over triplets.

Triplets by the length of their long context and by the depth of their evidence.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.results.long_context import Interval
from megatron_solopo.results.preference import MeanWithInterval

_TAIL = 0.025
_Z = NormalDist().inv_cdf(1 - _TAIL)
_RESAMPLES = 2_000
_SEED = 0


class MeanScore(NamedTuple):
    """A mean of scores and its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    interval: Interval


def estimate(scores: Sequence[float]) -> MeanScore:
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
        return MeanScore(mean, *_wilson(mean, len(values)), "wilson")
    draws = np.random.default_rng(_SEED).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (_TAIL, 1 - _TAIL))
    return MeanScore(mean, float(low), float(high), "bootstrap")


def _wilson(mean: float, count: int) -> tuple[float, float]:
    centre = mean + _Z**2 / (2 * count)
    margin = _Z * (mean * (1 - mean) / count + _Z**2 / (4 * count**2)) ** 0.5
    scale = 1 + _Z**2 / count
    # At a mean of 0 or 1 the interval ends there, but for rounding.
    return min(mean, (centre - margin) / scale), max(mean, (centre + margin) / scale)


_GRID = 100_001
_FAR = 40.0


def proportion(hits: NDArray[np.bool_]) -> MeanWithInterval:
    """Share of hits, with Wilson's score interval, which stays inside [0, 1] and is honest near its ends."""
    share, low, high, _ = estimate(hits.astype(np.float64).tolist())
    return MeanWithInterval(mean=share, low=low, high=high)


def mean(values: NDArray[np.float64]) -> MeanWithInterval:
    """Mean, with Student's interval of its standard error; a single value says nothing of its spread, and has none."""
    center = float(np.mean(values))
    if len(values) == 1:
        return MeanWithInterval(mean=center, low=None, high=None)
    half = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return MeanWithInterval(mean=center, low=center - half, high=center + half)


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


Mask = NDArray[np.bool_]
DEPTH_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def bucket_bound(tokens: int) -> int:
    """The least power of two that is not below this number of tokens."""
    return 1 << (max(tokens, 1) - 1).bit_length()


def by_length(tokens: NDArray[np.int64]) -> Iterator[tuple[dict[str, Any], Mask]]:
    """Powers of two: {"above": 4096, "up_to": 8192} holds lengths in (4096, 8192]; only buckets that hold any."""
    bounds = np.array([bucket_bound(int(each)) for each in tokens], dtype=np.int64)
    for up_to in map(int, np.unique(bounds)):
        yield {"above": up_to // 2, "up_to": up_to}, bounds == up_to


def by_depth(depths: Sequence[Sequence[float]]) -> Iterator[tuple[dict[str, Any], Mask]]:
    """Fifths of the long context, {"start": 0.2, "end": 0.4}; {"start": None, "end": None} where the depth is unknown.

    A triplet whose evidence lies in several pieces counts once in every fifth that holds one.
    """
    last = len(DEPTH_EDGES) - 2
    fifths = [{min(int(np.searchsorted(DEPTH_EDGES, d, "right")) - 1, last) for d in each} for each in depths]
    for place in range(last + 1):
        mask = np.array([place in each for each in fifths], dtype=bool)
        if mask.any():
            yield {"start": DEPTH_EDGES[place], "end": DEPTH_EDGES[place + 1]}, mask
    unknown = np.array([not each for each in fifths], dtype=bool)
    if unknown.any():
        yield {"start": None, "end": None}, unknown
