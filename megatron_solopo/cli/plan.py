"""`megatron-solopo plan`: what fits, how long it takes, what it costs."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megatron_solopo.errors import UserError
from megatron_solopo.plan import VARIED

if TYPE_CHECKING:
    from megatron_solopo.plan.layouts import Proof
    from megatron_solopo.plan.search import LayoutEstimate, Planner

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


def split_varied(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """The names of --vary, checked."""
    names = tuple(filter(None, value.split(",")))
    if unknown := [name for name in names if name not in VARIED]:
        raise click.BadParameter(f"unknown {', '.join(unknown)}; choose from {','.join(VARIED)}")
    return names


@click.command()
@click.argument("overrides", nargs=-1)
@click.option("--config", "path", type=click.Path(path_type=Path), required=True, help="YAML config.")
@click.option("--gpus", type=click.IntRange(1), required=True, help="How many.")
@click.option("--gpu", "gpu_name", required=True, help="Type: a100, h100, h200, b200, ... or one of --gpu-file.")
@click.option("--gpu-file", type=_FILE, help="YAML file with further GPU types.")
@click.option("--tokens", help="Lengths, where data.path is not prepared: short=1024,long=8192:131072,response=512.")
@click.option("--triplets", type=click.IntRange(1), default=10_000, show_default=True, help="Together with --tokens.")
@click.option("--vary", callback=split_varied, default="recompute,offload,cp_comm", show_default=True,
              help="What to choose besides the sizes; fp8 too, if asked for. Else as the config says.")  # fmt: skip
@click.option(
    "--calibration", type=_FILE, help="JSON of tools.benchmarks.benchmark: measured efficiencies for assumed ones."
)
@click.option("--price", type=click.FloatRange(0, min_open=True), help="Of one GPU-hour.")
@click.option("--top", type=click.IntRange(1, 20), default=5, show_default=True, help="Layouts to list.")
@click.option("--explain", help="Show this layout in full instead of the best: tp=8,pp=4,cp=4,vpp=2.")
@click.option("--why-not", is_flag=True, help="List every refused layout with its first reason.")
@click.option("--dry-run", is_flag=True, help="Build the chosen layout's distinct ranks without a GPU and compare.")
@click.option("--emit-sbatch", type=_FOLDER, help="Write submit.sbatch and config.yaml of the chosen layout here.")
@click.option("--picture", type=_FILE, help="Draw memory by stage and the pipeline's timeline into this PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    path: Path,
    overrides: tuple[str, ...],
    gpus: int,
    gpu_name: str,
    gpu_file: Path | None,
    vary: tuple[str, ...],
    tokens: str | None,
    triplets: int,
    calibration: Path | None,
    price: float | None,
    top: int,
    explain: str | None,
    why_not: bool,
    dry_run: bool,
    emit_sbatch: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Find the parallel layouts that fit, and estimate memory, time and cost, before a run queues for GPUs.

    Estimates rest on the model's shape, the lengths of the triplets and data-sheet figures of the GPUs; efficiencies
    are assumptions until --calibration replaces them.

    \b
    Examples:
      megatron-solopo plan --config c.yaml --gpus 64 --gpu h200
      megatron-solopo plan --config c.yaml --gpus 1024 --gpu h100 --explain tp=8,pp=4,cp=4 --dry-run
      megatron-solopo plan --config c.yaml --gpus 8 --gpu h100 --tokens short=1024,long=32768,response=512 \\
          --emit-sbatch launch --picture plan.png
    """
    from megatron_solopo.architecture.gpus import find_gpu, read_gpus
    from megatron_solopo.config import load_config
    from megatron_solopo.files import check_replaceable
    from megatron_solopo.plan import answer as report
    from megatron_solopo.plan import answer as session
    from megatron_solopo.plan.answer import run_of
    from megatron_solopo.plan.sbatch import SBATCH_FILES, write_sbatch

    config = load_config(path, overrides)
    gpu = find_gpu(gpu_name, read_gpus(gpu_file))
    workload = session.read_workload(config, tokens, triplets)
    if emit_sbatch is not None:
        check_replaceable(emit_sbatch, SBATCH_FILES, "--emit-sbatch")
    planner = session.make_planner(config, workload, gpu, gpus, vary, calibration)
    search = planner.search()
    if why_not and not as_json:
        click.echo(report.refusals(search.refused))
    chosen = session.choose(planner, search, explain)
    other = session.beside(planner) if explain is None else None
    proofs = prove(planner, chosen) if dry_run else []
    answer = session.PlanAnswer(planner, search, chosen, other, proofs, price, top)
    click.echo(answer.json if as_json else answer.text)
    if emit_sbatch is not None:
        write_sbatch(chosen, run_of(chosen, workload, price), emit_sbatch)
    if picture is not None:
        draw(chosen, picture)
    if any(proof.difference for proof in proofs):
        raise UserError("--dry-run: the estimate differs from what Megatron-Core allocates; see the table above")


def draw(chosen: "LayoutEstimate", path: Path) -> None:
    """Draw the picture; matplotlib is slow to import."""
    from megatron_solopo.plan.picture import draw_plan

    draw_plan(chosen, path)


def prove(planner: "Planner", chosen: "LayoutEstimate") -> "list[Proof]":
    """Build the chosen layout's distinct ranks; imports Megatron, on the CPU whatever this machine has."""
    os.environ["MEGATRON_SOLOPO_DEVICE"] = "cpu"
    from megatron_solopo.architecture.huggingface_config import read_architecture
    from megatron_solopo.plan.dry_run import dry_run

    packs = chosen.batch.heaviest_rank
    largest = max(packs, key=lambda pack: pack.padded_tokens)
    architecture = read_architecture(planner.config.model.path)  # with what its layers compute with
    return list(dry_run(architecture, chosen.layout, largest, len(packs)))
