"""Warnings are given where a run's course deserves one, once, and nowhere else."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_solopo.train.alarms import (
    Alarms,
    StepMetrics,
    both_rewards_falling,
    evaluation_not_finite,
    loss_spike,
    values,
)


def course(losses: Sequence[float | None]) -> list[dict[str, Any]]:
    return [{"step": number + 1, "loss": loss} for number, loss in enumerate(losses)]


def noisy(length: int, start: float = 0.7, slope: float = 0.0, noise: float = 0.02, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [start + slope * number + generator.gauss(0, noise) for number in range(length)]


def test_a_spike_is_told_with_its_height() -> None:
    warning = loss_spike(course([*noisy(50), 2.5]))
    assert warning and "loss 2.5000" in warning and "optimizer.lr" in warning and "\n" not in warning


@pytest.mark.parametrize(
    "losses",
    [
        noisy(60),
        noisy(60, slope=-0.01),
        [*noisy(50), -2.0],  # far below is no spike
        [*noisy(10), 2.5],  # too little to compare with
        [*noisy(50), None],
        [0.5] * 50 + [0.5 + 1e-6],  # no scatter at all
        [*noisy(20), *[0.7, None] * 10, 0.72],
    ],
    ids=["level", "falling", "low", "young", "skipped", "constant", "with skipped steps"],
)
def test_a_healthy_course_is_no_spike(losses: list[float | None]) -> None:
    steps = course(losses)
    assert [loss_spike(steps[: end + 1]) for end in range(len(steps))] == [None] * len(steps)


def test_earlier_spikes_do_not_hide_a_later_one() -> None:
    losses = noisy(50)
    losses[10::8] = [3.0] * len(losses[10::8])
    assert loss_spike(course([*losses, 3.0]))


def rewards(chosen: Sequence[float], rejected: Sequence[float]) -> list[StepMetrics]:
    return [{"rewards/chosen": a, "rewards/rejected": b} for a, b in zip(chosen, rejected, strict=True)]


def test_both_rewards_falling_is_told_with_the_remedy() -> None:
    warning = both_rewards_falling(rewards(noisy(50, 0.0, -0.01), noisy(50, -0.5, -0.03, seed=1)))
    assert warning and "rewards/chosen" in warning and "objective.nll_coefficient" in warning


@pytest.mark.parametrize(
    ("chosen_slope", "rejected_slope", "length"),
    [(0.0, -0.03, 50), (0.01, -0.03, 50), (-0.01, 0.0, 50), (0.0, 0.0, 50), (-0.01, -0.03, 49)],
    ids=["rejected alone", "apart", "chosen alone", "level", "young"],
)
def test_a_healthy_course_of_rewards_is_silent(chosen_slope: float, rejected_slope: float, length: int) -> None:
    steps = rewards(noisy(length, 0.0, chosen_slope), noisy(length, -0.5, rejected_slope, seed=1))
    assert both_rewards_falling(steps) is None


def test_an_evaluation_that_is_not_finite_is_told() -> None:
    steps: list[StepMetrics] = [{"loss": 0.5}, {"loss": 0.5, "eval_loss": 0.5}, {"loss": 0.5, "eval_loss": None}]
    assert [bool(evaluation_not_finite(steps[: end + 1])) for end in range(3)] == [False, False, True]


def above_one(steps: Sequence[StepMetrics]) -> str | None:
    return "high" if (values(steps[-1:], "loss") or [0.0])[0] > 1 else None


def test_each_alarm_is_given_when_it_begins() -> None:
    alarms = Alarms([], detectors=[above_one])
    assert [alarms.after(step) for step in course([0.5, 2, 3, None, 2])] == [[], ["high"], [], [], ["high"]]


def test_a_restart_does_not_forget() -> None:
    steps = course([*noisy(50), 2.5, 2.5])
    assert [len(Alarms([], detectors=[loss_spike]).after(step)) for step in steps[-2:]] == [0, 0]
    assert len(Alarms(steps[:50], detectors=[loss_spike]).after(steps[50])) == 1
    assert Alarms(steps[:51], detectors=[loss_spike]).after(steps[51]) == []
