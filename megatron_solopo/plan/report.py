"""A plan as text: tables for a terminal."""

from collections.abc import Sequence

from megatron_solopo.plan.memory import GIB
from megatron_solopo.plan.plan import Run, model_flops_utilization, overrides, run_of
from megatron_solopo.plan.proof import Proof
from megatron_solopo.plan.search import Estimate, Planner, Refusal


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


def ranking(estimates: Sequence[Estimate], planner: Planner, price: float | None) -> str:
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


def explanation(estimate: Estimate, planner: Planner, price: float | None) -> str:
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


def _memory_table(estimate: Estimate) -> str:
    names = list(estimate.stages[0].parts)
    rows = [
        [str(stage.pipeline_rank), *(f"{size / GIB:.2f}" for size in (*stage.parts.values(), stage.total, stage.host))]
        for stage in estimate.stages
    ]
    return table(["rank", *names, "total", "host"], rows)


def _time_lines(estimate: Estimate) -> list[str]:
    time = estimate.time
    busiest = ", ".join(f"{name} {seconds:.3f}" for name, seconds in time.compute.parts.items())
    return [
        f"  last pipeline rank, all packs: {busiest}",
        f"  pipeline {time.timeline.seconds:.3f} (bubble {time.timeline.bubble:.1%} of all ranks' time)",
        f"  gradient reduction and parameter gather {time.data_traffic:.3f}, optimizer {time.optimizer:.3f}",
        f"  together {time.seconds:.3f}: {estimate.triplets_per_second:.3f} triplets/s",
    ]


def _run_lines(run: Run) -> list[str]:
    cost = "" if run.cost is None else f", cost {run.cost:,.0f}"
    return [
        f"Run: {run.steps:,} steps, reference pass {run.reference_seconds / 3600:.2f} h, "
        f"{run.hours:,.2f} h in all, {run.gpu_hours:,.0f} GPU-hours{cost} (checkpoints and evaluation not counted)"
    ]


def comparison(ours: tuple[Planner, Estimate], other: tuple[Planner, Estimate], price: float | None) -> str:
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
