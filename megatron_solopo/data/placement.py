"""Where the evidence lies in a long context.

Depth of a document: where its middle lies among the tokens of all documents, from 0 to 1.

Depths are spread by Latin hypercube sampling (McKay et al. 1979): over the whole data set, the first piece of evidence
of every sample has a stratum of its own, so has the second, and so on, in orders that know nothing of each other;
within its stratum each depth is drawn by the sample's own generator. RULER's `qa.py` draws from one seed again for
every sample, and all samples of a size have their evidence at the same places.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.data.seeds import generator

_UNIFORM_AT_5_PERCENT = 1.358


def draw_depths(
    count: int, sample: int, samples: int, seed: int, stream: str, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Depths [count] for the evidence of one of `samples` samples.

    Args:
        count: Pieces of evidence.
        sample: Number of the sample, below `samples`.
        samples: Size of the data set.
        seed: Of the data set; with `stream`, which tells data sets of one seed apart, it orders the strata.
        rng: Of the sample.
    """
    strata = [_strata(samples, seed, f"{stream}:{ordinal}")[sample] for ordinal in range(count)]
    return (np.array(strata, dtype=np.float64) + rng.random(count)) / samples


@lru_cache(maxsize=64)
def _strata(samples: int, seed: int, stream: str) -> NDArray[np.int64]:
    return generator(seed, f"strata:{stream}").permutation(samples)


def arrange(
    evidence: Sequence[int], others: Sequence[int], depths: NDArray[np.float64], tokens: NDArray[np.int32]
) -> list[int]:
    """All documents in order: the others as given, each piece of evidence in the gap nearest to its depth.

    Args:
        evidence: Documents, as indices into `tokens`.
        others: Documents, as indices into `tokens`.
        depths: [len(evidence)], one for each.
        tokens: Length of every document.
    """
    sizes = tokens[np.asarray(evidence, dtype=np.int64)]
    gaps = np.concatenate([[0], np.cumsum(tokens[np.asarray(others, dtype=np.int64)])])
    total = gaps[-1] + sizes.sum()
    arranged, start, placed = list[int](), 0, 0.0
    for index in np.argsort(depths, kind="stable"):
        # How much of the others comes before it, if its middle is to lie at its depth.
        before = depths[index] * total - placed - sizes[index] / 2
        gap = max(start, int(np.abs(gaps - before).argmin()))
        arranged += [*others[start:gap], evidence[index]]
        start, placed = gap, placed + sizes[index]
    return [*arranged, *others[start:]]


def evidence_depths(documents: Sequence[int], evidence: Collection[int], tokens: NDArray[np.int32]) -> list[float]:
    """Depth of each piece of evidence, in the order of the context."""
    sizes = tokens[np.asarray(documents, dtype=np.int64)].astype(np.int64)
    middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
    return [round(float(depth), 4) for depth, index in zip(middles, documents, strict=True) if index in evidence]


def uniform_distance(depths: Sequence[float]) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of depths to the uniform distribution on [0, 1], and its 5 % critical value.

    The critical value is the asymptotic one, 1.358 / sqrt(n), for independent draws; stratified ones lie well below.
    """
    ordered = np.sort(np.asarray(depths, dtype=np.float64))
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(float(np.max(steps[1:] - ordered)), float(np.max(ordered - steps[:-1])))
    return distance, _UNIFORM_AT_5_PERCENT / len(ordered) ** 0.5
