"""The alarm of a collapsing alignment, on made-up courses and on recorded ones of `examples/reproduction`."""

import json
import random
from pathlib import Path

import pytest

from megatron_solopo.train.alarms import DETECTORS, Alarms, gap_closes_from_below

RECORDED = Path(__file__).resolve().parents[2] / "examples" / "reproduction" / "runs.jsonl"


def course(nll: tuple[float, float], gap: tuple[float, float], steps: int = 40, noise: float = 0.02):
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
    warning = gap_closes_from_below(course((0.5, 1.2), (2.0, 0.3)))
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
    assert gap_closes_from_below(course(nll, gap)) is None, why


def test_scatter_alone_does_not_warn() -> None:
    steps = course((0.5, 0.8), (2.0, 0.3), noise=0.6)
    assert gap_closes_from_below(steps) is None and gap_closes_from_below(course((0.5, 0.8), (2.0, 0.3)))


def test_it_waits_for_two_stretches_and_passes_over_other_objectives_and_skipped_steps() -> None:
    falling = course((0.5, 1.2), (2.0, 0.3), steps=19)
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


def test_a_run_is_warned_once_while_it_collapses() -> None:
    assert gap_closes_from_below in DETECTORS
    alarms = Alarms([])
    lines = [line for step in course((0.5, 1.2), (2.0, 0.3)) for line in alarms.after(step) if "wrong side" in line]
    assert len(lines) == 1
