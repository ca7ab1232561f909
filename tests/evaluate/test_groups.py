"""Which triplets belong together."""

import numpy as np
import pytest

from megatron_solopo.evaluate.statistics import bucket_bound, by_depth, by_length


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
