"""The pictures of training: losses, rewards, the SoLo gap, sources, experts, gradient norm and throughput by step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_solopo.report.figure import Picture, Theme, add_legend, empty_figure, style_axes
from megatron_solopo.report.runs import RunRecord
from megatron_solopo.run_directory import SOURCE_METRIC

_MAX_POINTS = 400
_MIN_STEPS_TO_SMOOTH = 50
_PANELS_PER_ROW = 3


@dataclass(frozen=True)
class Panel:
    """One plot with a line for every run and metric."""

    title: str
    metrics: tuple[tuple[str, str, str], ...]
    """(name in metrics.jsonl, line style, label). A run has the same colour in all panels."""


_LOSSES = (
    Panel("Loss", (("loss", "-", ""), ("eval_loss", "o", "held out"))),
    Panel("Preference loss", (("po_loss", "-", ""), ("eval_po_loss", "o", "held out"))),
    Panel("Alignment loss, before alpha", (("solo_ra/loss", "-", ""), ("eval_solo_ra/loss", "o", "held out"))),
)
_REWARDS = (
    Panel("Reward of the chosen answer", (("rewards/chosen", "-", ""), ("rewards/chosen_long", ":", "long context"))),
    Panel("Reward of the rejected answer", (("rewards/rejected", "-", ""),)),
    Panel("Reward accuracy", (("rewards/accuracies", "-", ""), ("eval_rewards/accuracies", "o", "held out"))),
)
_GAPS = (
    Panel("Size of the gap", (("solo_ra/gap_abs", "-", ""), ("eval_solo_ra/gap_abs", "o", "held out"))),
    Panel("Gap, short minus long", (("solo_ra/gap_signed", "-", ""), ("eval_solo_ra/gap_signed", "o", "held out"))),
    Panel(
        "Divergence at a token (nats)", (("token_alignment/kl", "-", ""), ("eval_token_alignment/kl", "o", "held out"))
    ),
)
_OF_SOURCES = (
    (
        "source-losses",
        "Loss of each source",
        "The mean over the rows of a source, under its own objective. The scales of objectives differ.",
        "loss",
    ),
    (
        "source-accuracies",
        "Reward accuracy of each source",
        "The share of a source's rows whose chosen answer has the greater reward.",
        "rewards/accuracies",
    ),
)
"""(name, title, caption, metric), with a panel for each source."""
_EXPERTS = (
    Panel("Fullest expert over the mean", (("moe/load_max_over_mean", "-", ""),)),
    Panel("Entropy of routers (nats)", (("moe/entropy", "-", ""),)),
    Panel("Routes that agree", (("moe/route_agreement", "-", ""),)),
    Panel("Load-balancing loss, before its coefficient", (("moe/load_balancing_loss", "-", ""),)),
    Panel("z-loss, before its coefficient", (("moe/z_loss", "-", ""),)),
)
_MACHINE = (
    Panel("Gradient norm", (("grad_norm", "-", ""),)),
    Panel("Learning rate", (("learning_rate", "-", ""),)),
    Panel("Tokens per second", (("tokens_per_second", "-", ""),)),
)
_FIGURES = (
    ("losses", "Losses", "The loss that training minimises, and parts of it.", _LOSSES),
    (
        "rewards",
        "Rewards",
        "Rewards of the pair that the loss compares. Dotted: the chosen answer behind the long context.",
        _REWARDS,
    ),
    (
        "gap",
        "SoLo gap",
        "Reward of the chosen answer, short minus long context. If the gap closes while the chosen reward falls, "
        "the short context has become worse. Divergence: with objective.token_alignment, of the model behind the long "
        "context from the model behind the short one.",
        _GAPS,
    ),
    (
        "experts",
        "Experts",
        "A load of 1 is perfect balance; ranks with fuller experts make the others wait. Entropy 0: a router is sure "
        "of one expert for each token. Routes that agree, where a response is behind both contexts: the share of its "
        "tokens' experts that are the same. If it is low, a part of the SoLo gap is a matter of routes.",
        _EXPERTS,
    ),
    (
        "gradient-and-throughput",
        "Gradient norm and throughput",
        "The gradient norm is before clipping. Tokens are counted without padding.",
        _MACHINE,
    ),
)


def curve_pictures(runs: Sequence[RunRecord]) -> Iterator[Picture]:
    """The pictures for which some run has a metric."""
    for name, title, caption, panels in (*_FIGURES, *_figures_of_sources(runs)):
        shown = [
            panel for panel in panels if any(run.series(metric)[0] for run in runs for metric, _, _ in panel.metrics)
        ]
        if shown:
            smoothed = any(len(run.steps) >= _MIN_STEPS_TO_SMOOTH for run in runs)
            pale = " Pale: as recorded; strong: a running mean over a twentieth of the steps." if smoothed else ""
            dots = " Dots: on held-out rows." if _has_dots(runs, shown) else ""
            yield Picture(
                name,
                title,
                caption + dots + pale,
                f"{title} over the steps of {', '.join(run.name for run in runs)}: "
                f"{', '.join(panel.title.lower() for panel in shown)}.",
                partial(_draw, runs=runs, panels=shown),
            )


def _figures_of_sources(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str, str, tuple[Panel, ...]]]:
    """Like `_FIGURES`. Every source of any run has a panel, so that sources of one name are side by side."""
    found = (SOURCE_METRIC.fullmatch(metric) for run in runs for step in run.steps for metric in step)
    names = dict.fromkeys(each["source"] for each in found if each and not each["held_out"])
    for name, title, caption, metric in _OF_SOURCES:
        panels = [
            Panel(source, ((f"source/{source}/{metric}", "-", ""), (f"eval_source/{source}/{metric}", "o", "held out")))
            for source in names
        ]
        yield name, title, caption, tuple(panels)


def _has_dots(runs: Sequence[RunRecord], panels: Sequence[Panel]) -> bool:
    names = [name for panel in panels for name, line, _ in panel.metrics if line == "o"]
    return any(run.series(name)[0] for run in runs for name in names)


def _draw(theme: Theme, runs: Sequence[RunRecord], panels: Sequence[Panel]) -> Figure:
    across = min(len(panels), _PANELS_PER_ROW)
    down = math.ceil(len(panels) / across)
    drawn = empty_figure(theme, 12, 3.3 * down)
    axes = list(drawn.subplots(down, across, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        style_axes(axis, theme, panel.title, "step")
        for place, run in enumerate(runs):
            for name, line, words in panel.metrics:
                _plot(axis, theme, run, place, name, line, words)
        if panel is panels[0]:
            add_legend(axis, theme)
    return drawn


def _plot(axis: Axes, theme: Theme, run: RunRecord, place: int, name: str, line: str, words: str) -> None:
    steps, values = run.series(name)
    if not steps:
        return
    colour = theme.colour(place)
    label = run.name if not words else None
    if line == "o" or len(steps) == 1:
        axis.plot(steps, values, "o", color=colour, markersize=5, label=label if len(steps) == 1 else None)
        return
    style = theme.line(place) if line == "-" else line
    if len(steps) < _MIN_STEPS_TO_SMOOTH:
        axis.plot(steps, values, style, color=colour, linewidth=1.8, label=label)
        return
    axis.plot(*thinned(steps, values), color=colour, linewidth=0.8, alpha=0.3)
    axis.plot(*thinned(steps, running_mean(values)), style, color=colour, linewidth=1.8, label=label)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the values around each one. The window is narrower at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    means: list[float] = ((sums[high] - sums[low]) / (high - low)).tolist()
    return means


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of neighbours, at most 400 points."""
    group = -(-len(steps) // _MAX_POINTS)
    starts = range(0, len(steps), group)
    means = ([float(np.mean(each[start : start + group])) for start in starts] for each in (steps, values))
    return next(means), next(means)
