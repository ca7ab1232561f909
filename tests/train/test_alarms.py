"""Warnings about a run's course, on made-up courses and on recorded ones of `examples/reproduction`."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_solopo.train.alarms import (
    OBJECTIVE_DETECTORS,
    AlarmWarnings,
    StepMetrics,
    both_rewards_falling,
    evaluation_not_finite,
    gap_closes_from_below,
    loss_spike,
    metric_values,
    same_rank_is_slowest,
)
from megatron_solopo.train.state import SkippedSteps, TrainState

RECORDED = Path(__file__).resolve().parents[2] / "examples" / "reproduction" / "runs.jsonl"


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


def waits(ranks: Sequence[int | None], share: float | None) -> list[dict[str, Any]]:
    return [{"straggler_rank": rank, "straggler_share": None if rank is None else share} for rank in ranks]


def test_a_rank_that_is_the_slowest_again_and_again_is_named() -> None:
    warning = same_rank_is_slowest(waits([5] * 9 + [1] * 4 + [5] * 7, 0.12))
    assert warning and warning.startswith("rank 5 is the slowest in 16 of the last 20 steps") and "12% of" in warning
    assert "profile.ranks=[5]" in warning and "\n" not in warning


@pytest.mark.parametrize(
    "steps",
    [
        waits([5] * 19, 0.5),  # too few
        waits([5, 1] * 10, 0.5),  # now this one, now that one
        waits([5] * 15 + [1] * 5, 0.5),
        waits([5] * 20, 0.04),  # it costs little
        waits([None] * 40, None),  # one replica
    ],
    ids=["young", "by turns", "three quarters", "cheap", "one replica"],
)
def test_ranks_that_are_late_by_chance_are_no_straggler(steps: list[dict[str, Any]]) -> None:
    assert same_rank_is_slowest(steps) is None


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
    of_sources: StepMetrics = {"eval_loss": None, "eval_source/pairs/loss": 0.5, "eval_source/chats/loss": None}
    assert "held-out triplets of chats is" in (evaluation_not_finite([of_sources]) or "")


def above_one(steps: Sequence[StepMetrics]) -> str | None:
    return "high" if (metric_values(steps[-1:], "loss") or [0.0])[0] > 1 else None


def test_each_alarm_is_given_when_it_begins(tmp_path: Path) -> None:
    alarms = AlarmWarnings(tmp_path / "metrics.jsonl", detectors=[above_one])
    assert [alarms.new_warnings(step) for step in course([0.5, 2, 3, None, 2])] == [[], ["high"], [], [], ["high"]]


def continued(folder: Path, recorded: Sequence[StepMetrics]) -> AlarmWarnings:
    """The spike detector of a run that continues after these steps."""
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(step) + "\n" for step in recorded))
    alarms = AlarmWarnings(file, detectors=[loss_spike])
    alarms.on_start(TrainState(len(recorded), {}, SkippedSteps()))
    return alarms


def test_a_restart_does_not_forget(tmp_path: Path) -> None:
    steps = course([*noisy(50), 2.5, 2.5])
    assert [len(continued(tmp_path, []).new_warnings(step)) for step in steps[-2:]] == [0, 0]
    assert len(continued(tmp_path, steps[:50]).new_warnings(steps[50])) == 1
    assert continued(tmp_path, steps[:51]).new_warnings(steps[51]) == []


def collapse(nll: tuple[float, float], gap: tuple[float, float], steps: int = 40, noise: float = 0.02):
    """Metrics that go from the first value to the second in equal steps, with scatter; rewards as SimPO's, beta 2."""
    rng = random.Random(0)
    found = []
    for step in range(steps):
        level = nll[0] + (nll[1] - nll[0]) * step / (steps - 1) + rng.gauss(0, noise)
        distance = gap[0] + (gap[1] - gap[0]) * step / (steps - 1) + abs(rng.gauss(0, noise))
        values = {"nll_loss": level, "rewards/chosen": -2 * level, "solo_ra/gap_abs": distance}
        found.append({"step": step + 1, "loss": 1.0} | values)
    return found


def test_a_reward_that_falls_while_the_gap_closes_is_told_with_numbers_and_keys() -> None:
    warning = gap_closes_from_below(collapse((0.5, 1.2), (2.0, 0.3)))
    assert warning is not None and "\n" not in warning
    assert "solo_ra/gap_abs" in warning and "rewards/chosen" in warning and "objective.detach_short=true" in warning


@pytest.mark.parametrize(
    ("nll", "gap", "why"),
    [
        ((0.5, 0.5), (2.0, 0.3), "the long side came up"),
        ((0.5, 0.2), (2.0, 0.3), "both came up"),
        ((0.5, 1.2), (2.0, 2.5), "the gap grew: no work of the alignment"),
        ((0.5, 1.2), (2.0, 1.9), "the gap stays"),
        ((0.5, 0.6), (2.0, 0.3), "little is lost on the short context"),
    ],
)
def test_other_courses_are_no_collapse(nll, gap, why) -> None:
    assert gap_closes_from_below(collapse(nll, gap)) is None, why


def test_scatter_alone_does_not_warn() -> None:
    steps = collapse((0.5, 0.8), (2.0, 0.3), noise=0.6)
    assert gap_closes_from_below(steps) is None and gap_closes_from_below(collapse((0.5, 0.8), (2.0, 0.3)))


def test_it_waits_for_two_stretches_and_passes_over_other_objectives_and_skipped_steps() -> None:
    falling = collapse((0.5, 1.2), (2.0, 0.3), steps=19)
    assert gap_closes_from_below(falling) is None
    assert gap_closes_from_below([{"step": 1, "rewards/chosen": -1.0, "nll_loss": 0.5}] * 40) is None
    skipped = [dict.fromkeys(step, None) for step in falling]
    assert gap_closes_from_below(falling + skipped) is None


def test_on_the_recorded_runs_it_tells_collapses_from_good_runs() -> None:
    """Nine in ten of those that lost a quarter of their base's short accuracy warn; of those that lost little, few."""
    lines = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    bases = {(line["strength"], line["seed"]): line["accuracy"]["16"] for line in lines if line["method"] == "base"}
    fired: dict[bool, list[bool]] = {True: [], False: []}
    for line in lines:
        lost = 1 - line["accuracy"]["16"] / bases[line["strength"], line["seed"]]
        if line["method"] == "solopo" and line["alpha"] and (lost >= 0.25 or lost < 0.05):
            names = line["trajectories"]
            steps = [dict(zip(names, values, strict=True)) for values in zip(*names.values(), strict=True)]
            warned = any(gap_closes_from_below(steps[:end]) for end in range(20, len(steps) + 1))
            fired[lost >= 0.25].append(warned)
    assert len(fired[True]) >= 5 and sum(fired[True]) >= 0.9 * len(fired[True])
    assert len(fired[False]) >= 30 and sum(fired[False]) <= 0.1 * len(fired[False])


def test_a_run_is_warned_once_while_it_collapses(tmp_path: Path) -> None:
    assert gap_closes_from_below in OBJECTIVE_DETECTORS
    alarms = AlarmWarnings(tmp_path / "metrics.jsonl")
    steps = collapse((0.5, 1.2), (2.0, 0.3))
    lines = [line for step in steps for line in alarms.new_warnings(step) if "wrong side" in line]
    assert len(lines) == 1


def mixed_course(length: int, every: int) -> list[dict[str, Any]]:
    """Triplets in every step, and a row of chats, with a loss four times as high, in every few."""
    steps = []
    for step, (triplets, chats) in enumerate(zip(noisy(length), noisy(length, 2.8, seed=1), strict=True)):
        drawn = step % every == 0
        losses = {"source/triplets/loss": triplets, "source/chats/loss": chats if drawn else None}
        steps.append({"step": step + 1, "loss": (3 * triplets + chats) / 4 if drawn else triplets} | losses)
    return steps


def test_sources_by_turns_are_no_spike_and_a_spike_of_one_is_told_with_its_name(tmp_path: Path) -> None:
    """A source in every tenth step has 20 steps to compare with only after 200."""
    steps = mixed_course(251, every=10)
    assert any(loss_spike(steps[: end + 1]) for end in range(len(steps))), "the mean over the rows jumps"
    alarms = AlarmWarnings(tmp_path / "metrics.jsonl", ["triplets", "chats"])
    assert [line for step in steps[:-1] for line in alarms.new_warnings(step)] == []
    spike = steps[-1] | {"source/chats/loss": 9.0}
    (line,) = alarms.new_warnings(spike)
    assert line.startswith("source chats: loss 9.0000 is far above the median 2.8")
    (line,) = alarms.new_warnings({"source/triplets/loss": 9.0, "source/chats/loss": None})
    assert line.startswith("source triplets: loss 9.0000")


def test_a_restart_does_not_forget_the_steps_of_a_light_source(tmp_path: Path) -> None:
    """Its last 20 rows lie in more steps than a detector sees."""
    *steps, last = mixed_course(301, every=15)
    spike = last | {"source/chats/loss": 9.0}
    file = tmp_path / "metrics.jsonl"
    for recorded, expected in ((steps, 1), ([*steps, spike], 0)):
        file.write_text("".join(json.dumps(step) + "\n" for step in recorded))
        alarms = AlarmWarnings(file, ["triplets", "chats"])
        alarms.on_start(TrainState(len(recorded), {}, SkippedSteps()))
        assert len(alarms.new_warnings(spike)) == expected
