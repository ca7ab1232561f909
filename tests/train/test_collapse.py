"""The alarm of a collapsing alignment, on made-up courses and on recorded ones of `examples/reproduction`."""

import random
from pathlib import Path

import pytest

from megatron_solopo.train.alarms import DETECTORS, Alarms
from megatron_solopo.train.collapse import gap_closes_from_below

RECORDED = Path(__file__).resolve().parents[2] / "examples" / "reproduction" / "runs.jsonl"


def course(reward: tuple[float, float], gap: tuple[float, float], steps: int = 40, noise: float = 0.05):
    """Metrics that go from the first value to the second in equal steps, with scatter."""
    rng = random.Random(0)
    return [
        {
            "step": step + 1,
            "loss": 1.0,
            "rewards/chosen": reward[0] + (reward[1] - reward[0]) * step / (steps - 1) + rng.gauss(0, noise),
            "solo_ra/gap_abs": gap[0] + (gap[1] - gap[0]) * step / (steps - 1) + abs(rng.gauss(0, noise)),
        }
        for step in range(steps)
    ]


def test_a_reward_that_falls_while_the_gap_closes_is_told_with_numbers_and_keys() -> None:
    warning = gap_closes_from_below(course((-1.0, -2.5), (2.0, 0.3)))
    assert warning is not None and "\n" not in warning
    assert "solo_ra/gap_abs" in warning and "rewards/chosen" in warning and "objective.detach_short=true" in warning


@pytest.mark.parametrize(
    ("reward", "gap", "why"),
    [
        ((-1.0, -1.0), (2.0, 0.3), "the long side came up"),
        ((-1.0, -0.5), (2.0, 0.3), "both came up"),
        ((-1.0, -2.5), (2.0, 2.5), "the gap grew: no work of the alignment"),
        ((-1.0, -1.1), (2.0, 0.3), "a small part of what closed the gap"),
    ],
)
def test_other_courses_are_no_collapse(reward, gap, why) -> None:
    assert gap_closes_from_below(course(reward, gap)) is None, why


def test_scatter_alone_does_not_warn() -> None:
    assert gap_closes_from_below(course((-1.0, -1.3), (0.5, 0.3), noise=0.6)) is None


def test_it_waits_for_two_stretches_and_passes_over_other_objectives_and_skipped_steps() -> None:
    falling = course((-1.0, -2.5), (2.0, 0.3), steps=19)
    assert gap_closes_from_below(falling) is None
    assert gap_closes_from_below([{"step": 1, "rewards/chosen": -1.0}] * 40) is None
    skipped = [dict.fromkeys(step, None) for step in falling]
    assert gap_closes_from_below(falling + skipped) is None


def test_a_run_is_warned_once_while_it_collapses() -> None:
    assert gap_closes_from_below in DETECTORS
    alarms = Alarms([])
    lines = [line for step in course((-1.0, -2.5), (2.0, 0.3)) for line in alarms.after(step) if "wrong side" in line]
    assert len(lines) == 1
