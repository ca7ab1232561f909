#!/usr/bin/env python3
"""Is FP8 good enough for these triplets? Train the same steps in two precisions and compare.

\b
On a GPU (the config's own precision is the baseline; OVERRIDES make the candidate):
    python -m tools.checks.fp8_acceptance --config config.yaml --output acceptance
    python -m tools.checks.fp8_acceptance --config config.yaml --output acceptance \\
        model.fp8=hybrid model.fp8_recipe=tensorwise
On a CPU, where there is no FP8, any other precision:
    python -m tools.checks.fp8_acceptance --config config.yaml --output acceptance model.dtype=bfloat16

Writes result.json and acceptance.png, prints a table and a verdict; exit code 1 if a threshold is not met. It costs two
short runs: --triplets forward passes and --steps training steps each, and one gradient in host memory.
"""

import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch
from torch import Tensor

from megatron_solopo.config import Config, Role, load_config
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, check_replaceable, write_json
from tools.reporting import environment, table

matplotlib.use("Agg")
warnings.filterwarnings("ignore", module=r"megatron\.core")  # of what is not installed here
_FILES = ("result.json", "acceptance.png")
_PACKAGES = ("torch", "megatron-core", "transformer-engine")


@dataclass(frozen=True)
class Criterion:
    """One number that must stay on its side of a threshold."""

    name: str
    value: float
    threshold: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        # False also where the value is not a number.
        return self.value >= self.threshold if self.at_least else self.value <= self.threshold


def configs(path: Path, overrides: Sequence[str]) -> tuple[Config, Config]:
    """Baseline and candidate, which may differ in their `model` section alone."""
    # Whole gradients are compared: the distributed optimizer would leave a rank its share of them.
    always = ("optimizer.use_distributed_optimizer=false", "optimizer.optimizer_offload_fraction=0")
    if any(override.startswith("model.fp8_param") for override in overrides):
        raise UserError(
            "model.fp8_param is not compared: it needs the distributed optimizer, which leaves no whole gradients; "
            "compare without it, for the matrix products are the same"
        )
    candidate = load_config(path, (*(overrides or ("model.fp8=e4m3",)), *always))
    baseline = load_config(
        path, ("model.fp8=null", "model.first_last_layers_bf16=false", "model.fp8_param=false", *always)
    )
    if candidate.model_copy(update={"model": baseline.model}) != baseline:
        raise UserError("only model.* may differ between the precisions; put everything else into the config file")
    if candidate == baseline or candidate.model.path != baseline.model.path:
        raise UserError("the candidate must be the same model in another precision, for example model.fp8=hybrid")
    return baseline, candidate


def compare(baseline: Config, candidate: Config, triplets: int, steps: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run both; numbers for the verdict, and the values behind the picture."""
    from megatron_solopo.model.resolve import check_precision, resolve_model
    from megatron_solopo.parallel import topology as process_groups
    from megatron_solopo.train.session import check_and_join
    from tools.checks.precision_runs import gradient_cosine, raw_gaps, root_mean_square, run_precision

    model, topology, (source,) = check_and_join(baseline)
    try:
        resolved = resolve_model(candidate.model, candidate.parallel, architecture=model.architecture)
        check_precision(resolved, candidate.optimizer)
        train = source.train.head(triplets)
        some = dataclasses.replace(source.datasets, by_split={"train": train})
        one, other = (run_precision(config, some, topology, steps) for config in (baseline, candidate))
        cosine = gradient_cosine(one.gradients, other.gradients, topology.device)
    finally:
        process_groups.destroy(topology)
    roles = baseline.objective.roles.all
    lengths_TR = response_lengths(train, roles)
    values = {"logp_difference": (other.logps_TR - one.logps_TR) / lengths_TR}
    numbers: dict[str, Any] = {"gradient_cosine": cosine}
    numbers["logp_difference_per_token"] = float(values["logp_difference"].abs().mean())
    if baseline.objective.name == "solopo":
        gaps = [raw_gaps(baseline.objective, run.logps_TR, lengths_TR) for run in (one, other)]
        values |= {"gap_baseline": gaps[0], "gap_candidate": gaps[1]}
        numbers["gap_size"] = root_mean_square(gaps[0])
        numbers["gap_noise"] = root_mean_square(gaps[1] - gaps[0]) / numbers["gap_size"]
    losses = [torch.tensor(run.losses) for run in (one, other)]
    numbers["loss_difference"] = float((losses[1] - losses[0]).abs().mean() / losses[0].abs().mean())
    curves = ("losses", "gaps", "grad_norms", "seconds")
    numbers["runs"] = {
        name: {curve: getattr(run, curve) for curve in curves}
        for name, run in (("baseline", one), ("candidate", other))
    }
    numbers["triplets"] = len(train)
    return numbers, values


def response_lengths(dataset: Any, roles: Sequence[Role]) -> Tensor:
    """Response tokens, `[T, R]`."""
    rows = dataset.rows(range(len(dataset)), roles)
    return torch.tensor([[len(row.responses[role.response]) for role in roles] for row in rows])


def draw(numbers: dict[str, Any], values: dict[str, Tensor], path: Path) -> None:
    """Differences at the start, and both runs' curves."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(20, 4.6), layout="constrained")
    axes[0].hist(values["logp_difference"].flatten().numpy(), bins=40)
    axes[0].set(title="log-prob per token, candidate minus baseline", xlabel="nats", ylabel="sequences")
    if "gap_baseline" in values:
        gaps = values["gap_baseline"].numpy(), values["gap_candidate"].numpy()
        axes[1].scatter(*gaps, s=12)
        ends = [min(each.min() for each in gaps), max(each.max() for each in gaps)]
        axes[1].plot(ends, ends, color="grey", linewidth=1)
    axes[1].set(title="reward gap, short minus long", xlabel="baseline", ylabel="candidate")
    for axis, curve, title in ((axes[2], "losses", "loss"), (axes[3], "gaps", "mean |reward gap|")):
        for name, run in numbers["runs"].items():
            axis.plot(range(1, len(run[curve]) + 1), run[curve], label=name)
        axis.set(title=title, xlabel="step")
        axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


@click.command(help=__doc__)
@click.option("--config", "path", type=click.Path(path_type=Path), required=True, help="What `train` takes.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory for the result.")
@click.option("--triplets", type=click.IntRange(1), default=64, show_default=True, help="First ones of the split.")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--min-gradient-cosine", default=0.98, show_default=True, help="Between the first step's gradients.")
@click.option("--max-logp-difference", default=0.05, show_default=True, help="Nats per token, mean of sizes.")
@click.option("--max-gap-noise", default=0.2, show_default=True, help="Of the reward gaps, relative to their size.")
@click.option("--max-loss-difference", default=0.05, show_default=True, help="Mean over the steps, relative.")
@click.argument("overrides", nargs=-1)
def main(
    path: Path,
    output: Path,
    triplets: int,
    steps: int,
    min_gradient_cosine: float,
    max_logp_difference: float,
    max_gap_noise: float,
    max_loss_difference: float,
    overrides: tuple[str, ...],
) -> None:
    try:
        check_replaceable(output, _FILES, "--output")
        baseline, candidate = configs(path, overrides)
        numbers, values = compare(baseline, candidate, triplets, steps)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    criteria = [
        Criterion("gradient_cosine", numbers["gradient_cosine"], min_gradient_cosine, at_least=True),
        Criterion("loss_difference", numbers["loss_difference"], max_loss_difference),
    ]
    if candidate.model.has_delayed_scales:
        click.echo("log-probs and gaps are not judged: with delayed scales, passes without gradients take bfloat16\n")
    else:
        criteria.append(
            Criterion("logp_difference_per_token", numbers["logp_difference_per_token"], max_logp_difference)
        )
        if "gap_noise" in numbers:
            criteria.append(Criterion("gap_noise", numbers["gap_noise"], max_gap_noise))
    accepted = all(criterion.passed for criterion in criteria)
    if int(os.environ.get("RANK", "0")) == 0:
        changed = {k: [v, getattr(candidate.model, k)] for k, v in baseline.model if v != getattr(candidate.model, k)}
        report(output, criteria, {"accepted": accepted, "model": changed} | numbers, values)
    sys.exit(0 if accepted else 1)


def report(output: Path, criteria: Sequence[Criterion], result: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Write the files and print the table."""
    output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    judged = [asdict(each) | {"passed": each.passed} for each in criteria]
    write_json(output / "result.json", environment(_PACKAGES) | {"device": device, "criteria": judged} | result)
    draw(result, values, output / "acceptance.png")
    cells = [
        [
            each.name,
            f"{each.value:.4g}",
            f"{'at least' if each.at_least else 'at most'} {each.threshold:g}",
            "yes" if each.passed else "NO",
        ]
        for each in criteria
    ]
    click.echo(table(("criterion", "measured", "asked", "met"), cells))
    changed = ", ".join(f"model.{key} {before} -> {after}" for key, (before, after) in result["model"].items())
    click.echo(f"\n{'accepted' if result['accepted'] else 'NOT accepted'}: {changed}; see {output}")


if __name__ == "__main__":
    main()
