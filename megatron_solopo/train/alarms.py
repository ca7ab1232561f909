"""Warnings about a run's course: detectors that look at the metrics of its last steps.

A detector is a pure function of the recorded steps, oldest first. It returns one line, which says what it sees and what
to look at or to change, or None. It sees at most `WINDOW` steps, those before a restart included. The values of a
skipped step are None.

With `data.sources`, a step's `loss` is a mean over the rows that it happens to draw, of objectives that do not compare.
So the detectors of an objective look at each source's own metrics, on the steps that have rows of it.

To add a detector, write a function and put it into `OBJECTIVE_DETECTORS` or `RUN_DETECTORS`.
"""

import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from megatron_solopo.files import read_jsonl
from megatron_solopo.run_directory import SOURCE_METRIC
from megatron_solopo.train.callbacks import Callback, say
from megatron_solopo.train.state import Metrics, TrainState

StepMetrics = Mapping[str, float | int | None]
Detector = Callable[[Sequence[StepMetrics]], str | None]

WINDOW = 200
_SPIKE_HISTORY = 50
_SPIKE_LEAST_HISTORY = 20
_SPIKE_SCORE = 8.0
_TREND_STEPS = 25
_TREND_SCORE = 3.0
_STRAGGLER_STEPS = 20
_STRAGGLER_LEAST_COUNT = 16
_STRAGGLER_SHARE = 0.1
_COLLAPSE_NAMES = ("solo_ra/gap_abs", "rewards/chosen", "nll_loss")
_COLLAPSE_STEPS = 10
_LEAST_FALL_OF_GAP = 0.2
_LEAST_RISE_OF_NLL = 0.2
_COLLAPSE_SCORE = 3.0


def metric_values(steps: Iterable[StepMetrics], name: str) -> list[float]:
    """A metric's values, of the steps that have it."""
    return [value for step in steps if (value := step.get(name)) is not None]


def loss_spike(steps: Sequence[StepMetrics]) -> str | None:
    """Warn if the newest loss is far above the 50 before it.

    The robust z-score is the distance from their median, divided by their median absolute deviation, times 0.6745. The
    factor makes it the z-score of a normal distribution (Iglewicz and Hoaglin, 1993). Earlier spikes hide no later one.
    """
    newest = steps[-1].get("loss")
    before = metric_values(list(steps[:-1])[-_SPIKE_HISTORY:], "loss")
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
    """Warn if chosen and rejected rewards both fell over the last 50 steps, by more than their scatter explains.

    The means of the first and the last 25 of these steps must differ by three standard errors of the difference.
    """
    falls = []
    for name in ("rewards/chosen", "rewards/rejected"):
        recent = metric_values(steps, name)[-2 * _TREND_STEPS :]
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
    """Warn if the newest evaluation's loss is NaN or infinite; it is null in `metrics.jsonl`."""
    if steps[-1].get("eval_loss", 0.0) is not None:
        return None
    found = (SOURCE_METRIC.fullmatch(name) for name, value in steps[-1].items() if value is None)
    of_sources = [each["source"] for each in found if each and each["held_out"] and each["metric"] == "loss"]
    where = f" of {', '.join(of_sources)}" if of_sources else ""
    return f"the loss of the held-out triplets{where} is not finite, though the training steps are; look at their rows"


def gap_closes_from_below(steps: Sequence[StepMetrics]) -> str | None:
    """Warn if the gap shrinks because the short reward falls, from the first ten of these steps to the last ten.

    The gap |r(x_short, y_w) - r(x_long, y_w)| does not say which side moves. A model that cannot raise the long reward
    can lower the short one instead, and forgets what it knew.

    The fall is measured by `nll_loss`, the nats per token of the chosen answer in the short context. Its scale is the
    same for every loss type. It must have risen by 0.2 and by three standard errors, and the gap must have lost a
    fifth. These numbers come from the runs of `examples/reproduction`, see its RESULTS.md.
    """
    found = [values for step in steps if None not in (values := tuple(step.get(name) for name in _COLLAPSE_NAMES))]
    if len(found) < 2 * _COLLAPSE_STEPS:
        return None
    before, after = (
        list(zip(*stretch, strict=True)) for stretch in (found[:_COLLAPSE_STEPS], found[-_COLLAPSE_STEPS:])
    )
    (gap, reward, nll), (gap_now, reward_now, nll_now) = (map(statistics.fmean, each) for each in (before, after))
    error = ((statistics.variance(before[2]) + statistics.variance(after[2])) / _COLLAPSE_STEPS) ** 0.5
    if gap_now > (1 - _LEAST_FALL_OF_GAP) * gap or nll_now - nll < max(_LEAST_RISE_OF_NLL, _COLLAPSE_SCORE * error):
        return None
    return (
        f"the gap closes from the wrong side: solo_ra/gap_abs {gap:.4f} -> {gap_now:.4f} while rewards/chosen "
        f"{reward:+.4f} -> {reward_now:+.4f} over {len(found)} steps, nll_loss {nll:.4f} -> {nll_now:.4f}; "
        "objective.detach_short=true lets only the long side move, or lower objective.alpha or optimizer.lr"
    )


def same_rank_is_slowest(steps: Sequence[StepMetrics]) -> str | None:
    """Warn if one rank is the slowest in 16 of the last 20 steps, and the other replicas wait a tenth of the time."""
    known = [step for step in steps if step.get("straggler_rank") is not None][-_STRAGGLER_STEPS:]
    if len(known) < _STRAGGLER_STEPS:
        return None
    rank, count = Counter(step["straggler_rank"] for step in known).most_common(1)[0]
    share = statistics.median(
        metric_values((step for step in known if step["straggler_rank"] == rank), "straggler_share")
    )
    if count < _STRAGGLER_LEAST_COUNT or share < _STRAGGLER_SHARE:
        return None
    return (
        f"rank {rank} is the slowest in {count} of the last {len(known)} steps, and the other replicas wait for it "
        f"{share:.0%} of the time; look at the clock, temperature and memory errors of its GPU, and of those in its "
        f"replica; profile.ranks=[{rank}] shows what it does"
    )


OBJECTIVE_DETECTORS: tuple[Detector, ...] = (loss_spike, both_rewards_falling, gap_closes_from_below)
"""They read metrics of one objective: those of the run, or those of each source."""
RUN_DETECTORS: tuple[Detector, ...] = (evaluation_not_finite, same_rank_is_slowest)
"""They read what only the whole run has."""


class _Watch:
    """Some detectors, the steps that they see, and which of them see something already."""

    def __init__(self, detectors: Sequence[Detector], source: str = "") -> None:
        """With a source, the detectors see its own metrics under the names that a run of it alone would have."""
        self._detectors, self._source = detectors, source
        self._steps: deque[StepMetrics] = deque(maxlen=WINDOW)
        self._warned = [False] * len(detectors)

    def replay(self, recorded: Sequence[StepMetrics]) -> None:
        """See the steps before a restart. Their warnings were given."""
        own = (step for step in reversed(recorded) if self._own(step) is not None)
        for step in reversed(list(islice(own, WINDOW))):
            self.new_warnings(step)

    def new_warnings(self, step: StepMetrics) -> list[str]:
        """The warnings that begin with this step."""
        if (own := self._own(step)) is None:
            return []
        self._steps.append(own)
        steps = list(self._steps)
        found = [detector(steps) for detector in self._detectors]
        new = [line for line, warned in zip(found, self._warned, strict=True) if line and not warned]
        self._warned = [bool(line) for line in found]
        return [f"source {self._source}: {line}" for line in new] if self._source else new

    def _own(self, step: StepMetrics) -> StepMetrics | None:
        """What the detectors see of a step; None if it has no row of their source."""
        if not self._source:
            return step
        prefix = f"source/{self._source}/"
        if step.get(f"{prefix}loss") is None:
            return None
        return {name.removeprefix(prefix): value for name, value in step.items() if name.startswith(prefix)}


class AlarmWarnings(Callback):
    """On rank 0: prints a warning when a detector begins to see something, and again only after it had stopped."""

    def __init__(
        self,
        metrics_file: Path,
        sources: Sequence[str] = ("",),
        detectors: Sequence[Detector] = OBJECTIVE_DETECTORS,
    ) -> None:
        """`detectors` look at each source: the names of `data.sources`, or "" for the run's only one."""
        self._metrics_file = metrics_file
        self._watches = [*(_Watch(detectors, source) for source in sources), _Watch(RUN_DETECTORS)]

    def on_start(self, state: TrainState) -> None:
        """Continue after the steps in `metrics.jsonl`, without repeating their warnings."""
        recorded = read_jsonl(self._metrics_file) if self._metrics_file.is_file() else []
        for watch in self._watches:
            watch.replay(recorded)

    def on_step_end(self, metrics: Metrics) -> None:
        """Print what is new."""
        for warning in self.new_warnings(metrics):
            say(f"warning: step {metrics['step']}: {warning}")

    def new_warnings(self, step: StepMetrics) -> list[str]:
        """The warnings that begin with this step."""
        return [line for watch in self._watches for line in watch.new_warnings(step)]
