#!/usr/bin/env python3
"""Compare the losses of two runs, step by step.

    python -m tools.checks.compare_losses RUN_A RUN_B --tolerance 1e-5

Runs that differ in their parallel layout alone start equal to rounding (about 1e-6); each update then
amplifies the rounding, Adam's first ones most. Gradient norms are compared, too: a loss curve alone can
hide a wrongly scaled gradient behind clipping and Adam. Exit code 1 if anything differs by more than
the tolerance.
"""

import math
import sys
from pathlib import Path

import click

from megatron_solopo.files import read_jsonl

_METRICS = ("loss", "grad_norm")


@click.command(help=__doc__)
@click.argument("run_a", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("run_b", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tolerance", default=1e-5, show_default=True, help="Greatest relative difference that is the same.")
def main(run_a: Path, run_b: Path, tolerance: float) -> None:
    """Print a table of both runs' losses and gradient norms, and a verdict."""
    steps_a, steps_b = (read_jsonl(run / "metrics.jsonl") for run in (run_a, run_b))
    if [step["step"] for step in steps_a] != [step["step"] for step in steps_b] or not steps_a:
        sys.exit(f"different steps: {len(steps_a)} in {run_a}, {len(steps_b)} in {run_b}")
    click.echo(f"{'step':>6}{'loss A':>14}{'loss B':>14}{'grad norm A':>14}{'grad norm B':>14}")
    worst = 0.0
    for a, b in zip(steps_a, steps_b, strict=True):
        click.echo(f"{a['step']:>6}" + "".join(f"{run[name]:>14.7f}" for name in _METRICS for run in (a, b)))
        worst = max(worst, *(_relative_difference(a[name], b[name]) for name in _METRICS))
    same = worst <= tolerance
    verdict = "same" if same else "DIFFERENT"
    click.echo(f"{verdict}: greatest relative difference {worst:.1e}, tolerance {tolerance:.0e}")
    sys.exit(not same)


def _relative_difference(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


if __name__ == "__main__":
    main()
