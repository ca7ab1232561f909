"""The order of a mixture, against the rule that it states: draw what is due first, one by one."""

from fractions import Fraction

import numpy as np
import pytest

from megatron_solopo.data.mixture import Stream, pass_order

LENGTHS, WEIGHTS = (7, 3, 40), (2.0, 1.0, 0.25)


def drawn_one_by_one(count: int) -> list[int]:
    """The source of each place."""
    shares = [Fraction(weight) / sum(map(Fraction, WEIGHTS)) for weight in WEIGHTS]
    draws, sources = [0] * len(shares), []
    for _ in range(count):
        due = [
            (Fraction(2 * done + 1, 2) / share, number)
            for number, (done, share) in enumerate(zip(draws, shares, strict=True))
        ]
        _, source = min(due)
        draws[source] += 1
        sources.append(source)
    return sources


def source_of(rows: np.ndarray) -> list[int]:
    return np.searchsorted(np.cumsum(LENGTHS), rows, side="right").tolist()


def test_every_place_takes_what_is_due_first() -> None:
    stream = Stream(LENGTHS, WEIGHTS, seed=5)
    expected = drawn_one_by_one(500)
    assert source_of(stream.rows(0, 500)) == expected
    for places in (0, 1, 2, 17, 499):
        assert stream.drawn(places) == tuple(expected[:places].count(source) for source in range(3))


def test_any_part_can_be_asked_for() -> None:
    stream = Stream(LENGTHS, WEIGHTS, seed=5)
    whole = stream.rows(0, 300)
    for start, end in ((0, 1), (13, 14), (100, 300), (299, 300)):
        assert stream.rows(start, end).tolist() == whole[start:end].tolist()


def test_each_pass_over_a_source_takes_every_row_once_in_a_new_order() -> None:
    rows = Stream(LENGTHS, WEIGHTS, seed=5).rows(0, 400)
    second = rows[(rows >= 7) & (rows < 10)] - 7
    passes = second[: len(second) // 3 * 3].reshape(-1, 3)
    assert len(passes) > 20
    assert all(sorted(each) == [0, 1, 2] for each in passes.tolist())
    assert len({tuple(each) for each in passes.tolist()}) > 1


def test_every_batch_has_the_shares_to_within_one_row() -> None:
    stream = Stream(LENGTHS, WEIGHTS, seed=0)
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    for start in range(0, 6400, 64):
        counts = np.bincount(source_of(stream.rows(start, start + 64)), minlength=3)
        assert (abs(counts - 64 * shares) <= 1.0).all()


def test_one_source_is_the_plain_shuffled_stream() -> None:
    plain = np.concatenate([pass_order(11, 1234, number) for number in range(3)])
    assert Stream([11], [0.3], 1234).rows(4, 30).tolist() == plain[4:30].tolist()


@pytest.mark.parametrize(
    ("weights", "counts"), [((1.0, 1.0), (50, 50)), ((3.0, 1.0), (75, 25)), ((1e-6, 1.0), (0, 100))]
)
def test_sources_of_one_length_have_orders_of_their_own(weights: tuple[float, float], counts: tuple[int, int]) -> None:
    rows = Stream((50, 50), weights, seed=9).rows(0, 100)
    orders = [np.concatenate([pass_order(50, 9, number, source) for number in range(2)]) for source in range(2)]
    assert orders[0].tolist() != orders[1].tolist()
    assert rows[rows < 50].tolist() == orders[0][: counts[0]].tolist()
    assert (rows[rows >= 50] - 50).tolist() == orders[1][: counts[1]].tolist()
