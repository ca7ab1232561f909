"""The picture of a plan: memory of every pipeline rank by part, and the pipeline's timeline."""

from pathlib import Path
from typing import Any

import matplotlib

from megatron_solopo.files import atomic_path
from megatron_solopo.plan.memory import GIB
from megatron_solopo.plan.search import LayoutEstimate

matplotlib.use("Agg")

_DRAWN_ROUNDS = 6
"""Rounds of the schedule that are drawn. The other rounds repeat them."""


def draw_plan(estimate: LayoutEstimate, path: Path) -> None:
    """Draw the picture of a layout into a PNG file."""
    from matplotlib import pyplot

    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(18, 7), layout="constrained", width_ratios=(2, 3))
    figure.suptitle(f"{estimate.layout.name} on {estimate.layout.gpus} x {estimate.gpu.device_name}")
    _draw_memory(estimate, memory)
    _draw_timeline(estimate, time)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    pyplot.close(figure)


def _draw_memory(estimate: LayoutEstimate, axis: Any) -> None:
    ranks = [stage.pipeline_rank for stage in estimate.stages]
    bottom = [0.0] * len(ranks)
    for name in estimate.stages[0].parts:
        heights = [stage.parts[name] / GIB for stage in estimate.stages]
        if any(heights):
            axis.bar(ranks, heights, bottom=bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axis.axhline(estimate.gpu.memory_gib, color="black", linestyle="--", label=f"{estimate.gpu.device_name}")
    axis.set(title="memory of one GPU, estimated", xlabel="pipeline rank", ylabel="GiB", xticks=ranks)
    axis.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=4)


def _draw_timeline(estimate: LayoutEstimate, axis: Any) -> None:
    stages = estimate.time.timeline.stages
    chunks = 1 + max(span.work.chunk for span in stages[0])
    shown = _DRAWN_ROUNDS * max(2, len(stages)) * chunks
    for rank, spans in enumerate(stages):
        for is_forward, color in ((True, "tab:blue"), (False, "tab:green")):
            bars = [(span.start, span.end - span.start) for span in spans[:shown] if span.work.is_forward is is_forward]
            axis.broken_barh(bars, (rank - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.3)
    axis.broken_barh([], (0, 0), facecolors="tab:blue", label="forward")
    axis.broken_barh([], (0, 0), facecolors="tab:green", label="backward")
    axis.set(
        title=f"beginning of one step's pipeline; waiting over the whole step: {estimate.time.timeline.bubble:.1%}",
        xlabel="seconds",
        ylabel="pipeline rank",
        yticks=range(len(stages)),
    )
    axis.invert_yaxis()
    axis.legend(loc="lower right")
