#!/usr/bin/env python3
"""Measure on a CPU what a step costs with adapters (LoRA) and of the whole model, here and in TRL with PEFT.

\b
    OMP_NUM_THREADS=1 python -m tools.benchmarks.lora_benchmark --json lora.json

All four cases train the same random weights on the same long pair with DPO, as `benchmark.py` does. Adapters stand
beside all linear layers, and begin with the same numbers. Each case runs in a process of its own, all of them in turn
in each round. Times are medians over the rounds. Bytes are those of torch's tensors. FLOPs are those of the matrix
products, counted by torch, which counts no attention on a CPU. Neither depends on what else runs.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import click

from megatron_solopo.files import write_json
from tools.benchmarks.bench_case import LONG_PO, TRL
from tools.benchmarks.bench_report import Row
from tools.benchmarks.bench_results import merged
from tools.benchmarks.benchmark import check, comparison_options, measure_case
from tools.reporting import environment, table

SAME_WORK = "data.share_prompts=false"
"""TRL computes the prompt of each answer."""
AGREEMENT = 1e-3
"""Greatest relative difference between the gradient norms of the two systems."""
_MIB = 2**20


def disagreements(rows: dict[tuple[str, str], Row]) -> Iterator[str]:
    """Losses that are not ln 2, as at the start of every run, and gradients that the two systems disagree about."""
    for (system, trained), row in rows.items():
        if abs(row["losses"][0] - math.log(2)) > AGREEMENT:
            yield f"{system}, {trained}: the loss is {row['losses'][0]:.6f} and not ln 2"
        ours = rows[LONG_PO, trained]["grad_norms"][0]
        if abs(row["grad_norms"][0] - ours) > AGREEMENT * ours:
            yield f"{trained}: the norm of the gradient is {ours:.6g} here and {row['grad_norms'][0]:.6g} in {system}"


def cases_table(rows: dict[tuple[str, str], Row]) -> str:
    cells = []
    for (system, trained), row in rows.items():
        forward, whole = row["forward_flops"], row["step_flops"]
        cells.append(
            [system, trained, f"{median(row['seconds']):.2f}"]
            + [f"{row[key] / _MIB:,.1f}" for key in ("held_bytes", "allocated_bytes")]
            + ["-" if forward is None else f"{count / 1e9:,.1f}" for count in (forward, whole - (forward or 0))]
            + [f"{whole / 1e9:,.1f}", f"{row['grad_norms'][0]:.6g}"]
        )
    counts = ("forward GFLOPs", "backward GFLOPs", "step GFLOPs", "gradient norm")
    return table(("system", "trained", "step s", "held MiB", "peak MiB", *counts), cells)


def ratios_table(rows: dict[tuple[str, str], Row]) -> str:
    """Adapters over the whole model by system, and TRL over ours by what is trained."""
    systems, kinds = (list(dict.fromkeys(key[place] for key in rows)) for place in (0, 1))
    pairs = [(f"{system}: {kinds[1]} / {kinds[0]}", (system, kinds[1]), (system, kinds[0])) for system in systems]
    pairs += [(f"{kind}: {TRL} / {LONG_PO}", (TRL, kind), (LONG_PO, kind)) for kind in kinds if len(systems) > 1]
    cells = []
    for name, over, under in pairs:
        one, other = rows[over], rows[under]
        quotients = [median(one["seconds"]) / median(other["seconds"])]
        quotients += [one[key] / other[key] for key in ("held_bytes", "allocated_bytes", "step_flops")]
        cells.append([name, *(f"{quotient:.3f}" for quotient in quotients)])
    return table(("ratio", "step time", "held", "peak", "FLOPs of a step"), cells)


@click.command(help=__doc__)
@comparison_options(long_tokens=1024, response_tokens=128, steps=5)
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True)
def main(
    shape: str,
    rank: int,
    long_tokens: int,
    response_tokens: int,
    rounds: int,
    steps: int,
    without_trl: bool,
    json_path: Path | None,
) -> None:
    systems = [LONG_PO] if without_trl else [LONG_PO, TRL]
    check(systems, long_tokens, [long_tokens], response_tokens)
    sizes = {"long_tokens": [long_tokens], "short_tokens": long_tokens, "response_tokens": response_tokens}
    sizes |= {"triplets": 1, "warmup": 2, "steps": steps, "trl_variants": ["sdpa"]}
    sizes |= {"every_variant": False, "profile": None}
    result = environment(("torch", "megatron-core", "transformers", "trl", "peft"))
    found: dict[tuple[str, str], list[Row]] = {}
    for number in range(rounds):
        for trained, overrides in (("whole model", []), (f"rank {rank}", [f"lora.rank={rank}"])):
            for system in systems:
                row = measure_case(system, shape, [*overrides, SAME_WORK], sizes)
                found.setdefault((system, trained), []).append(row)
                seconds = median(row["seconds"])
                click.echo(f"[{number + 1}/{rounds}] {system}, {trained}: {seconds:.2f} s per step", err=True)
    rows = {case: merged(each) for case, each in found.items()}
    result["load_average_after"] = os.getloadavg()[0]
    click.echo("\n".join(f"{key}: {value}" for key, value in result.items()))
    click.echo(f"\n{cases_table(rows)}\n\n{ratios_table(rows)}")
    if json_path:
        cases = [row | {"trained": trained} for (_, trained), row in rows.items()]
        write_json(json_path, result | {"shape": shape, "rank": rank, "sizes": sizes, "cases": cases})
    if wrong := list(disagreements(rows)):
        raise click.ClickException("; ".join(wrong))


if __name__ == "__main__":
    main()
