"""What a plan says of a layout: the length and price of the run, utilization, the keys that make it.

A plan as text: tables for a terminal.

What the command `plan` does, step by step: read, choose, compare, tell.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_solopo.architecture.flops import forward_flops
from megatron_solopo.architecture.gpus import Efficiency, Gpu, check_fp8_of
from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.config import Config
from megatron_solopo.errors import UserError
from megatron_solopo.plan import answer as report
from megatron_solopo.plan.calibration import calibrated
from megatron_solopo.plan.layouts import Proof, make_layout
from megatron_solopo.plan.memory import GIB
from megatron_solopo.plan.search import LayoutEstimate, Planner, Refusal, Search
from megatron_solopo.plan.workload import Workload, prepared_workload, stated_workload

_HOUR = 3600.0


@dataclass(frozen=True)
class PlannedRun:
    """A whole run under one layout."""

    steps: int
    step_seconds: float
    reference_seconds: float
    """Scoring every sequence once with the reference model; 0 where the loss needs none."""
    gpus: int
    price_per_gpu_hour: float | None

    @property
    def hours(self) -> float:
        """Wall clock, checkpoints and evaluation not counted."""
        return (self.steps * self.step_seconds + self.reference_seconds) / _HOUR

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs."""
        return self.hours * self.gpus

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        return None if self.price_per_gpu_hour is None else self.gpu_hours * self.price_per_gpu_hour


def run_of(estimate: LayoutEstimate, workload: Workload, price: float | None) -> PlannedRun:
    """Steps, hours and cost of training on the whole workload, reference pass included."""
    config = estimate.layout.config
    training = config.training
    triplets = training.num_train_epochs * workload.num_triplets
    steps = training.max_steps or -int(-triplets // training.global_batch_size)
    reference = 0.0
    if config.objective.needs_reference:
        reference = estimate.time.forward_seconds / estimate.batch.num_triplets * workload.num_triplets
    return PlannedRun(steps, estimate.time.seconds, reference, estimate.gpus, price)


def model_flops_utilization(estimate: LayoutEstimate, planner: Planner) -> float:
    """Model FLOPs by true lengths over what the GPUs' bfloat16 peak could do in a step."""
    rows, roles = planner.packer.rows, planner.packer.roles
    prompts, responses = planner.workload.prompts, planner.workload.responses
    tokens = squares = answers = 0.0
    for role in roles:
        answer = responses[role.response][rows]
        lengths = prompts[role.context][rows] + answer
        tokens += float(lengths.sum())
        squares += float((lengths.astype(float) ** 2).sum())
        answers += float(answer.sum())
    flops = 3 * forward_flops(planner.architecture, tokens, squares, answers).total
    return flops / (estimate.time.seconds * estimate.gpus * estimate.gpu.bf16_tflops * 1e12)


def as_json(estimate: LayoutEstimate, planner: Planner, price: float | None) -> dict[str, Any]:
    """Everything about one layout, bytes and seconds."""
    run = run_of(estimate, planner.workload, price)
    time = estimate.time
    return {
        "objective": planner.config.objective.name,
        "layout": estimate.layout.sizes,
        "savers": estimate.layout.savers,
        "gpus": estimate.gpus,
        "fits": estimate.excess_gib <= 0,
        "memory_bytes": [
            {"pipeline_rank": stage.pipeline_rank, "total": stage.total, "host": stage.host}
            | {"packs_in_flight": stage.packs_in_flight}
            | stage.parts
            for stage in estimate.stages
        ],
        "step_seconds": time.seconds,
        "busiest_stage_seconds": time.compute.parts,
        "pipeline_seconds": time.timeline.seconds,
        "pipeline_bubble": time.timeline.bubble,
        "data_traffic_seconds": time.data_traffic,
        "optimizer_seconds": time.optimizer,
        "triplets_per_second": estimate.triplets_per_second,
        "mfu": model_flops_utilization(estimate, planner),
        "pad_waste": estimate.batch.pad_waste,
        "balance": estimate.batch.balance,
        "packs": estimate.batch.num_packs,
        "steps": run.steps,
        "reference_seconds": run.reference_seconds,
        "hours": run.hours,
        "gpu_hours": run.gpu_hours,
        "cost": run.cost,
        "overrides": overrides(estimate, planner.config),
    }


_ALWAYS_SHOWN = {
    "parallel": (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "cp_comm_type",
        "recompute_granularity",
    ),
    "model": ("fp8",),
    "optimizer": ("optimizer_offload_fraction",),
}


def overrides(estimate: LayoutEstimate, base: Config) -> list[str]:
    """Dotted keys that make this layout of the configuration that the plan began with."""
    found = {}
    for section, shown in _ALWAYS_SHOWN.items():
        given = getattr(base, section).model_dump()
        for name, value in getattr(estimate.layout.config, section).model_dump().items():
            if name in shown or value != given[name]:
                found[f"{section}.{name}"] = value
    return [f"{key}={_as_yaml(value)}" for key, value in found.items()]


def _as_yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to their widest cell: the first and the last, which are text, to the left."""
    last = len(columns) - 1
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]
    lines = []
    for row in (columns, *rows):
        padded = zip(row, widths, strict=True)
        cells = [cell.ljust(wide) if n in (0, last) else cell.rjust(wide) for n, (cell, wide) in enumerate(padded)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def ranking(estimates: Sequence[LayoutEstimate], planner: Planner, price: float | None) -> str:
    """The best layouts, one a line."""
    rows = []
    for place, estimate in enumerate(estimates, 1):
        run = run_of(estimate, planner.workload, price)
        rows.append(
            [
                f"{place}. {estimate.layout.name}",
                f"{estimate.time.seconds:,.2f}",
                f"{estimate.triplets_per_second:,.2f}",
                f"{model_flops_utilization(estimate, planner):.0%}",
                f"{estimate.time.timeline.bubble:.0%}",
                f"{estimate.fullest.total / GIB:.1f}",
                f"{run.hours:,.1f}",
                f"{run.gpu_hours:,.0f}",
                *([f"{run.cost:,.0f}"] if run.cost is not None else []),
                estimate.layout.savers,
            ]
        )
    columns = ["layout", "step s", "triplets/s", "MFU", "bubble", "GiB", "hours", "GPU-hours"]
    return table([*columns, *(["cost"] if price is not None else []), "besides"], rows)


def explanation(estimate: LayoutEstimate, planner: Planner, price: float | None) -> str:
    """One layout in full: memory by stage and part, time by what it is spent on, packing, the run."""
    run, gpu = run_of(estimate, planner.workload, price), estimate.gpu
    fits = "fits" if estimate.excess_gib <= 0 else f"does NOT fit: {estimate.excess_gib:.1f} GiB over"
    lines = [
        f"{estimate.layout.name} on {estimate.gpus} x {gpu.device_name}; besides: {estimate.layout.savers}",
        f"{fits} {gpu.memory_gib} GiB, fullest on pipeline rank {estimate.fullest.pipeline_rank}, "
        f"packs in flight there: {estimate.fullest.packs_in_flight}",
        "",
        "Memory, GiB per GPU of each pipeline rank",
        _memory_table(estimate),
        "",
        "Step, seconds",
        *_time_lines(estimate),
        "",
        f"Packing: {estimate.batch.num_packs} packs of {estimate.batch.num_triplets} triplets, "
        f"{estimate.batch.pad_waste:.2%} padding, balance {estimate.batch.balance:.3f} (1: all ranks work alike)",
        *_run_lines(run),
        "Overrides: " + " ".join(overrides(estimate, planner.config)),
    ]
    return "\n".join(lines)


def _memory_table(estimate: LayoutEstimate) -> str:
    names = list(estimate.stages[0].parts)
    rows = [
        [str(stage.pipeline_rank), *(f"{size / GIB:.2f}" for size in (*stage.parts.values(), stage.total, stage.host))]
        for stage in estimate.stages
    ]
    return table(["rank", *names, "total", "host"], rows)


def _time_lines(estimate: LayoutEstimate) -> list[str]:
    time = estimate.time
    busiest = ", ".join(f"{name} {seconds:.3f}" for name, seconds in time.compute.parts.items())
    return [
        f"  last pipeline rank, all packs: {busiest}",
        f"  pipeline {time.timeline.seconds:.3f} (bubble {time.timeline.bubble:.1%} of all ranks' time)",
        f"  gradient reduction and parameter gather {time.data_traffic:.3f}, optimizer {time.optimizer:.3f}",
        f"  together {time.seconds:.3f}: {estimate.triplets_per_second:.3f} triplets/s",
    ]


def _run_lines(run: PlannedRun) -> list[str]:
    cost = "" if run.cost is None else f", cost {run.cost:,.0f}"
    return [
        f"Run: {run.steps:,} steps, reference pass {run.reference_seconds / 3600:.2f} h, "
        f"{run.hours:,.2f} h in all, {run.gpu_hours:,.0f} GPU-hours{cost} (checkpoints and evaluation not counted)"
    ]


def comparison(ours: tuple[Planner, LayoutEstimate], other: tuple[Planner, LayoutEstimate], price: float | None) -> str:
    """The objective of the config beside another, each under its own best layout."""
    rows = []
    for its, estimate in (ours, other):
        run = run_of(estimate, its.workload, price)
        rows.append(
            [
                its.config.objective.name,
                f"{estimate.time.seconds:,.2f}",
                f"{estimate.triplets_per_second:,.3f}",
                f"{run.reference_seconds / 3600:,.2f}",
                f"{run.hours:,.2f}",
                f"{run.gpu_hours:,.0f}",
                f"{estimate.fullest.total / GIB:.1f}",
                f"{estimate.layout.name}; {estimate.layout.savers}",
            ]
        )
    columns = ["objective", "step s", "triplets/s", "reference h", "hours", "GPU-hours", "GiB", "layout"]
    return table(columns, rows)


def proofs(found: Sequence[Proof]) -> str:
    """Every rank that was built."""
    title = (
        "Dry run: bytes that Megatron-Core allocates on the ranks that differ; "
        "what autograd keeps in its schedule\n(saved) is with plain PyTorch layers, beside the estimate for those"
    )
    columns = [
        "rank",
        "place",
        "parameters",
        "bytes",
        "gradients",
        "optimizer",
        "estimate",
        "saved GiB",
        "estimate",
        "s",
    ]
    rows = [
        [
            str(each.rank),
            each.place,
            *(f"{number:,}" for number in (each.num_parameters, *each.built)),
            "equal" if not each.difference else each.difference,
            *("" if size is None else f"{size / GIB:.2f}" for size in (each.saved_bytes, each.estimated_saved_bytes)),
            f"{each.seconds:.1f}",
        ]
        for each in found
    ]
    return f"{title}\n{table(columns, rows)}"


def refusals(refused: Sequence[Refusal]) -> str:
    """Every refused layout with its first reason."""
    return "\n".join(f"{each.name}: {each.reason}" for each in refused)


def parse_sizes(text: str) -> dict[str, int | None]:
    """`tp=8,pp=4,cp=4,vpp=2` -> sizes; raises UserError naming the part that is none."""
    sizes: dict[str, int | None] = {"tp": 1, "pp": 1, "vpp": None, "cp": 1}
    stated = [re.fullmatch(r"(tp|pp|vpp|cp)=([1-9][0-9]{0,5})", part) for part in text.split(",")]
    for match, part in zip(stated, text.split(","), strict=True):
        if match is None:
            raise UserError(f"--explain {text!r}: {part!r} is none of tp=N, pp=N, vpp=N, cp=N (dp is what they leave)")
        sizes[match[1]] = int(match[2])
    if len({match[1] for match in stated if match}) < len(stated):
        raise UserError(f"--explain {text!r}: a size is stated twice")
    return sizes


def read_workload(config: Config, tokens: str | None, triplets: int) -> Workload:
    """Lengths as stated, or those of the prepared data."""
    if tokens is not None:
        return stated_workload(tokens, triplets, sample=4 * config.training.global_batch_size)
    try:
        return prepared_workload(config.data.path)
    except ValueError as error:
        raise UserError(f"{error}; or state the lengths with --tokens") from None


def make_planner(
    config: Config, workload: Workload, gpu: Gpu, gpus: int, vary: Sequence[str], calibration: Path | None
) -> Planner:
    """Read the model's config.json and, if given, the calibration."""
    if gpus > gpu.gpus_per_node and gpus % gpu.gpus_per_node:
        raise UserError(f"--gpus {gpus}: more than a node of {gpu.gpus_per_node}, so it must be a multiple of that")
    check_fp8_of(gpu, config.model)
    efficiency = Efficiency() if calibration is None else calibrated(calibration, gpu)
    architecture = read_architecture(config.model.path)
    planner = Planner(architecture, config, workload, gpu, gpus, efficiency, vary=vary)
    if (longest := workload.longest(planner.packer.roles)) > architecture.max_sequence_length:
        raise UserError(
            f"{workload.source}: sequences of up to {longest:,} tokens, but the model {config.model.path} has "
            f"{architecture.max_sequence_length:,} positions; shorten them, or extend the model in its config.json "
            "(rope_parameters, max_position_embeddings)"
        )
    return planner


def choose(planner: Planner, search: Search, explain: str | None) -> LayoutEstimate:
    """The layout asked for, or the best; raises UserError if there is none."""
    if explain is not None:
        return planner.best_of(make_layout(planner.config, parse_sizes(explain), planner.gpus))
    if not search.ranked:
        nearest = search.nearest
        advice = "" if nearest.excess_gib is None else "; take more GPUs, shorter contexts or GPUs with more memory"
        raise UserError(
            f"no layout fits on {planner.gpus} x {planner.gpu.device_name}; {nearest.name}: {nearest.reason}{advice} "
            "(--why-not lists all reasons)"
        )
    return search.ranked[0]


def beside(planner: Planner) -> tuple[Planner, LayoutEstimate] | None:
    """The best layout of the usual method where the config says solopo (and the other way round), or None."""
    name = {"solopo": "long_po", "long_po": "solopo"}.get(planner.config.objective.name)
    if name is None:
        return None
    other = planner.for_objective(name)
    ranked = other.search().ranked
    return (other, ranked[0]) if ranked else None


@dataclass(frozen=True, eq=False)
class PlanAnswer:
    """Everything that a plan tells."""

    planner: Planner
    search: Search
    chosen: LayoutEstimate
    other: tuple[Planner, LayoutEstimate] | None
    """The other objective's best layout."""
    proofs: Sequence[Proof]
    """Of the dry run, if any."""
    price: float | None
    """Of one GPU-hour."""
    top: int
    """Layouts to list."""

    @property
    def text(self) -> str:
        """Tables for a terminal."""
        planner, search, price = self.planner, self.search, self.price
        model = planner.architecture
        parts = [
            f"{model.model_type}, {model.num_parameters:,} parameters, {planner.config.model.dtype}\n"
            f"lengths: {planner.workload.source}; objective {planner.config.objective.name}\n"
            f"efficiencies: {planner.efficiency.source}"
        ]
        if search.ranked:
            counts = f"{search.num_fitting} layouts fit, {len(search.refused)} do not (--why-not); the best:"
            parts.append(f"{counts}\n{report.ranking(search.ranked[: self.top], planner, price)}")
        parts.append(report.explanation(self.chosen, planner, price))
        if self.other is not None:
            parts.append(report.comparison((planner, self.chosen), self.other, price))
        if self.proofs:
            parts.append(report.proofs(self.proofs))
        return "\n\n".join(parts)

    @property
    def json(self) -> str:
        """The same for machines: one object."""
        planner, price = self.planner, self.price
        found = {
            "model_parameters": planner.architecture.num_parameters,
            "gpu": planner.gpu.model_dump(),
            "efficiency": planner.efficiency.model_dump(),
            "reserve": planner.reserve.model_dump(),
            "chosen": as_json(self.chosen, planner, price),
            "other_objective": None if self.other is None else as_json(self.other[1], self.other[0], price),
            "ranking": [as_json(each, planner, price) for each in self.search.ranked[: self.top]],
            "num_fitting": self.search.num_fitting,
            "refused": [vars(each) for each in self.search.refused],
            "dry_run": [proof.as_json() for proof in self.proofs],
        }
        return json.dumps(found, indent=2)
