"""The picture at the end of a run."""

from pathlib import Path

import matplotlib

from megatron_solopo.files import atomic_path
from megatron_solopo.train.metrics import Metrics

matplotlib.use("Agg")

_PANELS = {
    "loss": ("loss", "po_loss", "eval_loss"),
    "reward": ("rewards/chosen", "rewards/rejected", "rewards/chosen_long"),
    "reward gap, short minus long": ("solo_ra/gap_abs", "solo_ra/gap_signed", "eval_solo_ra/gap_abs"),
    "reward accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "gradient norm": ("grad_norm",),
    "tokens per second": ("tokens_per_second",),
}


def plot_metrics(metrics: list[Metrics], path: Path) -> None:
    """Draw losses, rewards, accuracy and gradient norm over the steps into a PNG."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, _PANELS.items(), strict=True):
        for name in names:
            points = [(each["step"], each[name]) for each in metrics if each.get(name) is not None]
            if points:
                # Evaluations are far apart, and a single step would be an invisible line: dots.
                marker = "o" if name.startswith("eval_") or len(points) == 1 else ""
                axis.plot(*zip(*points, strict=True), label=name, marker=marker)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:  # short_po and long_po have no gap
            axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
