"""The alignment's failure, seen in a run's metrics: the gap closes because the short reward comes down.

|r(x_short, y_w) - r(x_long, y_w)| does not say which side moves. A model that cannot raise the long reward can lower
the short one instead, and forgets what it knew. Calibrated on the runs of `examples/reproduction`, see its RESULTS.md.

What a person should look at in a run's course: detectors over the stream of its metrics.

A detector is a pure function of the recorded steps, oldest first, the newest last; it returns one line of warning,
what is seen and what to look at or change, or None. To add one: a function here or in a file beside, and its place in
`DETECTORS`. It sees at most `WINDOW` steps, those before a restart among them; the values of a skipped step are None.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

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


StepMetrics = Mapping[str, float | int | None]
Detector = Callable[[Sequence[StepMetrics]], str | None]

WINDOW = 200
_SPIKE_HISTORY = 50
_SPIKE_LEAST_HISTORY = 20
_SPIKE_SCORE = 8.0
_TREND_STEPS = 25
_TREND_SCORE = 3.0


def values(steps: Iterable[StepMetrics], name: str) -> list[float]:
    """A metric over the steps that have it."""
    return [value for step in steps if (value := step.get(name)) is not None]


def loss_spike(steps: Sequence[StepMetrics]) -> str | None:
    """The newest loss stands out of the 50 before it.

    Robust z-score: the distance from their median in units of their median absolute deviation, times 0.6745, which
    makes it a normal distribution's z-score (Iglewicz and Hoaglin, 1993). Earlier spikes do not hide later ones.
    """
    newest = steps[-1].get("loss")
    before = values(list(steps[:-1])[-_SPIKE_HISTORY:], "loss")
    if newest is None or len(before) < _SPIKE_LEAST_HISTORY:
        return None
    median = statistics.median(before)
    deviation = statistics.median(abs(value - median) for value in before)
    score = 0.6745 * (newest - median) / max(deviation, 1e-3 * abs(median), 1e-12)
    if score < _SPIKE_SCORE:
        return None
    return (
        f"loss {newest:.4f} is far above the median {median:.4f} of the {len(before)} steps before "
        f"(robust z-score {score:.0f}); if it stays, lower optimizer.lr or optimizer.clip_grad"
    )


def both_rewards_falling(steps: Sequence[StepMetrics]) -> str | None:
    """Chosen and rejected rewards both went down over the last 50 steps, beyond what their scatter explains.

    Compares the means of two neighbouring stretches of 25 steps with the standard error of their difference.
    """
    falls = []
    for name in ("rewards/chosen", "rewards/rejected"):
        recent = values(steps, name)[-2 * _TREND_STEPS :]
        if len(recent) < 2 * _TREND_STEPS:
            return None
        earlier, later = recent[:_TREND_STEPS], recent[_TREND_STEPS:]
        error = ((statistics.variance(earlier) + statistics.variance(later)) / _TREND_STEPS) ** 0.5
        before, after = statistics.fmean(earlier), statistics.fmean(later)
        if before - after <= _TREND_SCORE * error:
            return None
        falls.append(f"{name} {before:+.4f} -> {after:+.4f}")
    return (
        f"both rewards fall: {', '.join(falls)} over {2 * _TREND_STEPS} steps; the margin grows by unlearning "
        "both answers: objective.nll_coefficient holds the chosen one up, a lower optimizer.lr slows it"
    )


def evaluation_not_finite(steps: Sequence[StepMetrics]) -> str | None:
    """The newest evaluation had a loss that is NaN or infinite; it is null in `metrics.jsonl`."""
    if steps[-1].get("eval_loss", 0.0) is not None:
        return None
    return "the loss of the held-out triplets is not finite, though the training steps are; look at their rows"


DETECTORS: tuple[Detector, ...] = (loss_spike, both_rewards_falling, gap_closes_from_below, evaluation_not_finite)


class Alarms:
    """The detectors over one run: each warns when it begins to see something, and again only after it had ceased."""

    def __init__(self, recorded: Iterable[StepMetrics], detectors: Sequence[Detector] = DETECTORS) -> None:
        """Continue behind the steps `recorded` so far."""
        self._steps: deque[StepMetrics] = deque(maxlen=WINDOW)
        self._detectors = detectors
        self._warned = [False] * len(detectors)
        for step in list(recorded)[-WINDOW:]:
            self.after(step)

    def after(self, step: StepMetrics) -> list[str]:
        """New warnings, now that `step` was recorded."""
        self._steps.append(step)
        steps = list(self._steps)
        found = [detector(steps) for detector in self._detectors]
        new = [line for line, warned in zip(found, self._warned, strict=True) if line and not warned]
        self._warned = [bool(line) for line in found]
        return new
