"""Curves of training: smoothing, and means of neighbours."""

import pytest

from megatron_solopo.report.curves import running_mean, thinned


def test_long_curves_keep_their_course() -> None:
    steps, values = thinned(range(1, 10_001), [float(step) for step in range(1, 10_001)])
    assert len(steps) == 400 and steps == values and steps[0] == 13.0
    assert running_mean([1.0] * 50) == pytest.approx([1.0] * 50)
    assert running_mean([0.0, 3.0, 6.0]) == pytest.approx([1.5, 3.0, 4.5])
