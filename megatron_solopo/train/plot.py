"""The picture at the end of a run."""

from pathlib import Path

import matplotlib

from megatron_solopo.files import atomic_path
from megatron_solopo.train.metrics import Metrics

matplotlib.use("Agg")

_PANELS = {
    "loss": ("loss", "po_loss", "solo_ra/loss", "eval_loss"),
    "reward": ("rewards/chosen", "rewards/rejected", "rewards/chosen_long"),
    "reward accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "gradient norm": ("grad_norm",),
}


def plot_metrics(metrics: list[Metrics], path: Path) -> None:
    """Draw losses, rewards, accuracy and gradient norm over the steps into a PNG."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, _PANELS.items(), strict=True):
        for name in names:
            points = [(each["step"], each[name]) for each in metrics if name in each]
            if points:
                # Evaluations are far apart, and a single step would be an invisible line: dots.
                marker = "o" if name.startswith("eval_") or len(points) == 1 else ""
                axis.plot(*zip(*points, strict=True), label=name, marker=marker)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
