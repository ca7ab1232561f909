"""The alignment's failure, seen in a run's metrics: the gap closes because the short reward comes down.

|r(x_short, y_w) - r(x_long, y_w)| does not say which side moves. A model that cannot raise the long reward can lower
the short one instead, and forgets what it knew. Thresholds are calibrated on the runs of `examples/reproduction`.
"""

import statistics
from collections.abc import Mapping, Sequence

_STRETCH = 10
_LEAST_FALL_OF_GAP = 0.2
_LEAST_SHARE = 0.25
_SCORE = 3.0


def gap_closes_from_below(steps: Sequence[Mapping[str, float | int | None]]) -> str | None:
    """`rewards/chosen` falls while `solo_ra/gap_abs` shrinks, from the first ten of these steps to the last ten.

    Warns where the gap lost a fifth, the chosen reward fell by more than its scatter explains (three standard errors),
    and that fall is a quarter or more of what the gap lost.
    """
    pairs = [
        (reward, gap)
        for step in steps
        if (reward := step.get("rewards/chosen")) is not None and (gap := step.get("solo_ra/gap_abs")) is not None
    ]
    if len(pairs) < 2 * _STRETCH:
        return None
    (rewards_before, gaps_before), (rewards, gaps) = (
        zip(*stretch, strict=True) for stretch in (pairs[:_STRETCH], pairs[-_STRETCH:])
    )
    reward_before, reward, gap_before, gap = map(statistics.fmean, (rewards_before, rewards, gaps_before, gaps))
    fall, closed = reward_before - reward, gap_before - gap
    error = ((statistics.variance(rewards_before) + statistics.variance(rewards)) / _STRETCH) ** 0.5
    if closed < _LEAST_FALL_OF_GAP * gap_before or fall <= _SCORE * error or fall < _LEAST_SHARE * closed:
        return None
    return (
        f"the gap closes from the wrong side: solo_ra/gap_abs {gap_before:.4f} -> {gap:.4f} while rewards/chosen "
        f"{reward_before:+.4f} -> {reward:+.4f} over {len(pairs)} steps; the short context is being unlearned: "
        "objective.detach_short=true lets only the long side move, or lower objective.alpha or optimizer.lr"
    )
