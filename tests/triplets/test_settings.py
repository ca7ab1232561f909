"""What `--long-tokens` may say."""

import numpy as np
import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.triplets.settings import parse_lengths


def draws(text: str, count: int = 4000) -> np.ndarray:
    plan = parse_lengths(text)
    return np.array([plan.draw(np.random.default_rng(seed)) for seed in range(count)])


def test_a_list_is_a_row_for_each() -> None:
    assert parse_lengths("8192").draw(np.random.default_rng(0)) == (8192,)
    plan = parse_lengths("4096, 131_072")
    assert plan.draw(np.random.default_rng(0)) == (4096, 131072) and plan.largest == 131072


def test_weights_are_shares() -> None:
    drawn = draws("4096:3,8192:1")
    assert set(drawn[:, 0]) == {4096, 8192} and abs((drawn == 4096).mean() - 0.75) < 0.03


def test_ranges_are_drawn_evenly_in_tokens_or_in_doublings() -> None:
    linear, logarithmic = draws("uniform:1000-16000"), draws("loguniform:1000-16000")
    for drawn in (linear, logarithmic):
        assert 1000 <= drawn.min() < 1100 and 15000 < drawn.max() <= 16000
    assert abs(np.median(linear) - 8500) < 500 and abs(np.median(logarithmic) - 4000) < 300


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "whole number"),
        ("4k", "whole number"),
        ("0", "at least 1"),
        ("-5", "whole number"),
        ("4096,,8192", "whole number"),
        ("4096,4096", "twice"),
        ("4096:1,8192", "every length has a weight"),
        ("4096:x", "a weight is a number"),
        ("4096:0", "above 0"),
        ("4096:inf", "finite"),
        ("uniform:8-8", "ends behind its beginning"),
        ("uniform:0-8", "begins at 1"),
        ("normal:1-8", "whole number"),
    ],
)
def test_anything_else_is_refused_with_the_legal_forms(text, reason) -> None:
    with pytest.raises(UserError, match=reason) as error:
        parse_lengths(text)
    assert "legal: 8192 | 4096,8192 |" in str(error.value) and "\n" not in str(error.value)
