"""The alignment's failure, seen in a run's metrics: the gap closes because the short reward comes down.

|r(x_short, y_w) - r(x_long, y_w)| does not say which side moves. A model that cannot raise the long reward can lower
the short one instead, and forgets what it knew. Calibrated on the runs of `examples/reproduction`, see its RESULTS.md.
"""

import statistics
from collections.abc import Mapping, Sequence

_NAMES = ("solo_ra/gap_abs", "rewards/chosen", "nll_loss")
_STRETCH = 10
_LEAST_FALL_OF_GAP = 0.2
_LEAST_RISE_OF_NLL = 0.2
_SCORE = 3.0


def gap_closes_from_below(steps: Sequence[Mapping[str, float | int | None]]) -> str | None:
    """`rewards/chosen` falls while `solo_ra/gap_abs` shrinks, from the first ten of these steps to the last ten.

    How far it falls is judged by `nll_loss`, nats per token of the chosen answer in the short context, whose scale is
    the same for every loss type: it rose by 0.2 and by three standard errors, while the gap lost a fifth or more.
    """
    found = [values for step in steps if None not in (values := tuple(step.get(name) for name in _NAMES))]
    if len(found) < 2 * _STRETCH:
        return None
    before, after = (list(zip(*stretch, strict=True)) for stretch in (found[:_STRETCH], found[-_STRETCH:]))
    (gap, reward, nll), (gap_now, reward_now, nll_now) = (map(statistics.fmean, each) for each in (before, after))
    error = ((statistics.variance(before[2]) + statistics.variance(after[2])) / _STRETCH) ** 0.5
    if gap_now > (1 - _LEAST_FALL_OF_GAP) * gap or nll_now - nll < max(_LEAST_RISE_OF_NLL, _SCORE * error):
        return None
    return (
        f"the gap closes from the wrong side: solo_ra/gap_abs {gap:.4f} -> {gap_now:.4f} while rewards/chosen "
        f"{reward:+.4f} -> {reward_now:+.4f} over {len(found)} steps, nll_loss {nll:.4f} -> {nll_now:.4f}; "
        "objective.detach_short=true lets only the long side move, or lower objective.alpha or optimizer.lr"
    )
