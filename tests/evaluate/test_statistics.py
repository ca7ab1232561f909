"""Confidence intervals against published and independently computed numbers."""

import numpy as np
import pytest

from megatron_solopo.evaluate.statistics import estimate


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe 1998, table I, method 3 (Wilson's score interval without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_proportions_have_wilsons_interval(right, count, low, high) -> None:
    found = estimate([1.0] * right + [0.0] * (count - right))
    assert found.mean == pytest.approx(right / count) and found.interval == "wilson"
    assert [found.low, found.high] == pytest.approx([low, high], abs=5e-5)


def test_means_have_a_bootstrap_interval() -> None:
    scores = np.random.default_rng(1).beta(2, 3, 400)
    found = estimate(list(scores))
    margin = 1.96 * scores.std() / 20  # of the normal approximation, which 400 samples allow
    assert found.interval == "bootstrap" and found.mean == pytest.approx(scores.mean())
    assert [found.low, found.high] == pytest.approx([scores.mean() - margin, scores.mean() + margin], abs=0.1 * margin)
    assert estimate(list(scores)) == found


def test_a_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    intervals = [estimate(list(rng.choice([0.0, 0.25, 0.5, 1.0], 50))) for _ in range(200)]
    covered = sum(each.low <= 0.4375 <= each.high for each in intervals)
    assert 178 <= covered <= 198


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_equal_scores_are_not_taken_for_certain(score) -> None:
    found = estimate([score] * 10)
    assert found.interval == "wilson" and found.high - found.low > 0.2
    assert found.low <= score <= found.high
