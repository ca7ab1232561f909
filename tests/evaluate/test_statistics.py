"""Means and confidence intervals against published and independently computed numbers, and groups of triplets."""

import math

import numpy as np
import pytest

from megatron_solopo.evaluate.statistics import (
    bucket_bound,
    by_depth,
    by_length,
    interval_kind,
    mean_measure,
    mean_score,
    proportion,
    student_t,
)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe 1998, table I, method 3 (Wilson's score interval without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_proportions_have_wilsons_interval(right, count, low, high) -> None:
    scores = [1.0] * right + [0.0] * (count - right)
    found = mean_score(scores)
    assert found.mean == pytest.approx(right / count) and interval_kind(scores) == "wilson"
    assert [found.low, found.high] == pytest.approx([low, high], abs=5e-5)


def test_means_have_a_bootstrap_interval() -> None:
    scores = np.random.default_rng(1).beta(2, 3, 400)
    found = mean_score(list(scores))
    margin = 1.96 * scores.std() / 20  # of the normal approximation, which 400 samples allow
    assert interval_kind(list(scores)) == "bootstrap" and found.mean == pytest.approx(scores.mean())
    assert [found.low, found.high] == pytest.approx([scores.mean() - margin, scores.mean() + margin], abs=0.1 * margin)
    assert mean_score(list(scores)) == found


def test_a_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    intervals = [mean_score(list(rng.choice([0.0, 0.25, 0.5, 1.0], 50))) for _ in range(200)]
    covered = sum(each.low <= 0.4375 <= each.high for each in intervals)
    assert 178 <= covered <= 198


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_equal_scores_are_not_taken_for_certain(score) -> None:
    found = mean_score([score] * 10)
    assert interval_kind([score] * 10) == "wilson" and found.high - found.low > 0.2
    assert found.low <= score <= found.high


def test_intervals_are_wilsons_and_students() -> None:
    share = proportion(np.array([True] * 8 + [False] * 2))
    assert (share.mean, share.low, share.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)  # Newcombe 1998's form
    assert proportion(np.array([True] * 5)).high == 1.0 and proportion(np.array([True] * 5)).low == pytest.approx(
        0.5655, abs=1e-4
    )
    values = mean_measure(np.array([1.0, 2.0, 3.0, 6.0]))
    half = 3.182446 * math.sqrt(14 / 3) / 2
    assert (values.mean, values.low, values.high) == pytest.approx((3.0, 3 - half, 3 + half))
    alone = mean_measure(np.array([2.5]))
    assert (alone.mean, alone.low, alone.high) == (2.5, None, None) and "[one triplet]" in str(alone)


@pytest.mark.parametrize(
    ("degrees", "percentile"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (10, 2.228139), (30, 2.042272), (1000, 1.962339), (10**6, 1.959966)],
)
def test_students_t_is_the_tables(degrees: int, percentile: float) -> None:
    assert student_t(degrees) == pytest.approx(percentile, rel=2e-6)


def test_lengths_fall_into_powers_of_two_that_hold_their_upper_bound() -> None:
    found = {bounds["up_to"]: mask.tolist() for bounds, mask in by_length(np.array([8192, 8193, 8100, 1, 4096]))}
    assert found == {
        1: [False, False, False, True, False],
        4096: [False, False, False, False, True],
        8192: [True, False, True, False, False],
        16384: [False, True, False, False, False],
    }
    assert all(bounds["above"] == bounds["up_to"] // 2 for bounds, _ in by_length(np.array([5, 600, 70000])))


@pytest.mark.parametrize("exponent", [1, 13, 29, 49, 52])
def test_bounds_are_exact(exponent: int) -> None:
    """A float logarithm takes 2**49 + 1 for 2**49."""
    assert bucket_bound(1 << exponent) == 1 << exponent and bucket_bound((1 << exponent) + 1) == 2 << exponent
    (found,) = by_length(np.array([(1 << exponent) + 1]))
    assert found[0] == {"above": 1 << exponent, "up_to": 2 << exponent}


def test_a_triplet_counts_at_the_depth_of_each_piece_and_once() -> None:
    depths = [[0.0, 0.1], [0.2], [0.19999, 1.0], [], [0.6]]
    found = {(bounds["start"], bounds["end"]): np.flatnonzero(mask).tolist() for bounds, mask in by_depth(depths)}
    assert found == {(0.0, 0.2): [0, 2], (0.2, 0.4): [1], (0.6, 0.8): [4], (0.8, 1.0): [2], (None, None): [3]}


@pytest.mark.parametrize("depths", [[[]] * 3, []])
def test_where_nothing_is_known_nothing_is_made_up(depths: list[list[float]]) -> None:
    assert [bounds["start"] for bounds, _ in by_depth(depths)] == [None] * bool(depths)
