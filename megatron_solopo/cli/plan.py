"""`megatron-solopo plan`: what fits, how long it takes, what it costs."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megatron_solopo.cli.options import JSON, PATH, settings_options
from megatron_solopo.errors import UserError
from megatron_solopo.plan import PlanSettings

if TYPE_CHECKING:
    from megatron_solopo.plan.answer import PlannedRun
    from megatron_solopo.plan.memory import RankCheck
    from megatron_solopo.plan.startup import StartupCounts


@click.command()
@click.argument("overrides", nargs=-1)
@click.option("--config", "path", type=PATH, required=True, help="YAML config.")
@settings_options(PlanSettings)
@JSON
def plan(settings: PlanSettings, path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Find the parallel layouts that fit, and estimate memory, time and cost, before a run queues for GPUs.

    Estimates rest on the model's shape, the lengths of the triplets and data-sheet figures of the GPUs. Efficiencies
    are assumptions until --calibration replaces them.

    \b
    Examples:
      megatron-solopo plan --config c.yaml --gpus 64 --gpu h200
      megatron-solopo plan --config c.yaml --gpus 8 --gpu h200 lora.rank=16 \\
          --vary recompute,offload,cp_comm,share_prompts,lora
      megatron-solopo plan --config c.yaml --gpus 1024 --gpu h100 --explain tp=8,pp=4,cp=4 --dry-run
      megatron-solopo plan --config c.yaml --gpus 8 --gpu h100 --tokens short=1024,long=32768,response=512 \\
          --emit-sbatch launch --picture plan.png
    """
    from megatron_solopo.config import load_config
    from megatron_solopo.files import check_replaceable
    from megatron_solopo.plan.answer import make_answer, make_planner
    from megatron_solopo.plan.sbatch import SBATCH_FILES, write_sbatch

    if settings.emit_sbatch is not None:
        check_replaceable(settings.emit_sbatch, SBATCH_FILES, "--emit-sbatch")
    config = load_config(path, overrides)
    planner = make_planner(config, settings, [each.partition("=")[0] for each in overrides])
    search = planner.search()
    if settings.why_not and not as_json:
        click.echo("\n".join(f"{each.name}: {each.reason}" for each in search.refused))
    answer = make_answer(planner, search, settings)
    if settings.dry_run:
        checks = check_ranks(answer.chosen)
        answer = replace(answer, rank_checks=checks, startup=count_starts(answer.chosen))
    click.echo(answer.as_json() if as_json else answer.as_text())
    if settings.emit_sbatch is not None:
        write_sbatch(answer.chosen, settings.emit_sbatch)
    if settings.picture is not None:
        from megatron_solopo.plan.picture import draw_plan  # matplotlib is slow to import

        draw_plan(answer.chosen.estimate, settings.picture)
    if any(check.difference for check in answer.rank_checks):
        raise UserError("--dry-run: the estimate differs from what Megatron-Core allocates; see the table above")


def check_ranks(chosen: "PlannedRun") -> "list[RankCheck]":
    """Build the ranks of the chosen layout that differ, on the CPU; imports Megatron."""
    os.environ["MEGATRON_SOLOPO_DEVICE"] = "cpu"
    from megatron_solopo.architecture.huggingface_config import read_architecture
    from megatron_solopo.plan.dry_run import dry_run

    packs = chosen.estimate.batch.heaviest_rank
    largest = max(packs, key=lambda pack: pack.padded_tokens)
    architecture = read_architecture(chosen.planner.config.model.path)
    return dry_run(architecture, chosen.layout, largest, len(packs))


def count_starts(chosen: "PlannedRun") -> "list[StartupCounts] | str":
    """Count what a start of the chosen layout costs a rank; or say why it cannot start, where a plan needs less."""
    from megatron_solopo.plan.startup_dry_run import count_startups

    try:
        return count_startups(chosen.layout.config)
    except UserError as error:
        return str(error)
