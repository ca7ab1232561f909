"""Means with 95 % confidence intervals, and the groups of triplets that they are taken over."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.results.long_context import Interval
from megatron_solopo.results.results_file import MeanWithInterval

_TAIL = 0.025
_Z = NormalDist().inv_cdf(1 - _TAIL)
_RESAMPLES = 2_000
_SEED = 0
# Of the sum for Student's t: its points, and the standard deviations behind which the density is zero in float64.
_GRID = 100_001
_FAR = 40.0

Mask = NDArray[np.bool_]
DEPTH_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def mean_score(scores: Sequence[float]) -> MeanWithInterval:
    """The mean of at least one score in [0, 1], always with an interval, see `interval_kind`."""
    values = np.asarray(scores, dtype=np.float64)
    assert len(values) and values.min() >= 0 and values.max() <= 1, "scores are in [0, 1]"
    mean = float(values.mean())
    if interval_kind(scores) == "wilson":
        low, high = _wilson(mean, len(values))
    else:
        draws = np.random.default_rng(_SEED).integers(len(values), size=(_RESAMPLES, len(values)))
        low, high = np.quantile(values[draws].mean(axis=1), (_TAIL, 1 - _TAIL)).tolist()
    return MeanWithInterval(mean=mean, low=low, high=high)


def interval_kind(scores: Sequence[float]) -> Interval:
    """Which interval the mean of these scores has.

    If all scores are 0 or 1: Wilson's score interval (Wilson 1927, without continuity correction). Else: the
    percentiles of 2,000 bootstrap means (Efron 1979), always the same for the same scores. If all scores are equal, a
    bootstrap says nothing, and the interval is Wilson's too. It assumes the variance of a proportion, which is the
    largest variance of scores in [0, 1] with this mean: it is too wide rather than too narrow.
    """
    return "wilson" if all(score in (0.0, 1.0) for score in scores) or len(set(scores)) == 1 else "bootstrap"


def _wilson(mean: float, count: int) -> tuple[float, float]:
    centre = mean + _Z**2 / (2 * count)
    margin = _Z * (mean * (1 - mean) / count + _Z**2 / (4 * count**2)) ** 0.5
    scale = 1 + _Z**2 / count
    # At a mean of 0 or 1 the interval ends there, except for rounding.
    return min(mean, (centre - margin) / scale), max(mean, (centre + margin) / scale)


def proportion(hits: Mask) -> MeanWithInterval:
    """Share of hits with Wilson's score interval, which stays inside [0, 1]."""
    return mean_score(hits.astype(np.float64).tolist())


def mean_measure(values: NDArray[np.float64]) -> MeanWithInterval:
    """Mean of any numbers with Student's interval; a single value has no interval."""
    center = float(np.mean(values))
    if len(values) == 1:
        return MeanWithInterval(mean=center, low=None, high=None)
    half = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return MeanWithInterval(mean=center, low=center - half, high=center + half)


@lru_cache
def student_t(degrees: int) -> float:
    """The 97.5th percentile of Student's t with at least 1 degree of freedom.

    With t = sqrt(degrees) tan(angle), the density of the angle is cos(angle) ** (degrees - 1). The trapezoidal rule
    sums it over the positive angles, of which 95 % lie below the percentile.
    """
    angles = np.linspace(0.0, min(math.pi / 2, _FAR / math.sqrt(degrees)), _GRID)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(degrees) * math.tan(float(np.interp(0.95 * below[-1], below, angles)))


def bucket_bound(tokens: int) -> int:
    """The smallest power of two that is not below this number of tokens."""
    return 1 << (max(tokens, 1) - 1).bit_length()


def by_length(tokens: NDArray[np.int64]) -> Iterator[tuple[dict[str, Any], Mask]]:
    """Group triplets by length in buckets that end at powers of two, and leave empty buckets out.

    {"above": 4096, "up_to": 8192} holds lengths in (4096, 8192].
    """
    bounds = np.array([bucket_bound(int(each)) for each in tokens], dtype=np.int64)
    for up_to in map(int, np.unique(bounds)):
        yield {"above": up_to // 2, "up_to": up_to}, bounds == up_to


def by_depth(depths: Sequence[Sequence[float]]) -> Iterator[tuple[dict[str, Any], Mask]]:
    """Group triplets by the fifth of the long context that holds their evidence, such as {"start": 0.2, "end": 0.4}.

    Triplets whose depth is unknown are in {"start": None, "end": None}. A triplet with several pieces of evidence
    counts once in every fifth that holds a piece.
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
