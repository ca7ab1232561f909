#!/usr/bin/env python3
"""Measure on a CPU what a step costs where the answers of a pair share their prompt, and where each has its own.

\b
    OMP_NUM_THREADS=1 python -m tools.benchmarks.sharing_benchmark --json sharing.json

All cases train the same random weights with DPO on the same triplet. TRL trains the long pair, and computes the prompt
of each answer. Each case runs in a process of its own, all of them in turn in each round. Times are medians over the
rounds: seconds of the processor, and of the clock. Bytes are those of torch's tensors. FLOPs are the model's, attention
included (megatron_solopo.train.metrics). It exits with 1 if gradients disagree or a shared step takes too long.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import click

from megatron_solopo.files import write_json
from tools.benchmarks.bench_case import LONG_PO, SHORT_PO, SOLOPO, TRL
from tools.benchmarks.bench_report import Row
from tools.benchmarks.bench_results import merged
from tools.benchmarks.benchmark import check, comparison_options, measure_case
from tools.reporting import environment, table

ALIGN_BOTH = "solopo, align: both"
OBJECTIVES = {
    SOLOPO: (SOLOPO, ()),
    ALIGN_BOTH: (SOLOPO, ("objective.align=both",)),
    LONG_PO: (LONG_PO, ()),
    SHORT_PO: (SHORT_PO, ()),
}
AGREEMENT = 1e-3
"""Greatest relative difference between the first gradient norms with and without sharing."""
PAIR_TARGET, SLACK = 0.58, 0.05
"""Of the processor's time, see `over_target`."""
_MIB = 2**20
Cases = dict[tuple[int, str, bool], Row]
"""By tokens of the short sequences, objective, and whether prompts are shared."""


def cases(with_trl: bool) -> Iterator[tuple[str, bool, str, list[str]]]:
    """Label, sharing, system and overrides of each case."""
    for label, (system, overrides) in OBJECTIVES.items():
        for share in (False, True):
            yield label, share, system, [*overrides, f"data.share_prompts={str(share).lower()}"]
    if with_trl:
        yield TRL, False, TRL, []


def cases_table(rows: Cases) -> str:
    """Every case: time, memory and gradient norm."""
    cells = []
    for (short, label, share), row in rows.items():
        times = [f"{median(row[key]):.2f}" for key in ("cpu_seconds", "seconds")]
        counts = [f"{row['tokens_per_step']:,}", f"{row['allocated_bytes'] / _MIB:,.1f}"]
        cells.append([f"{short:,}", label, "yes" if share else "no", *times, *counts, f"{row['grad_norms'][0]:.6g}"])
    return table(("S", "objective", "shared", "CPU s", "step s", "tokens", "peak MiB", "gradient norm"), cells)


def ratios_table(rows: Cases) -> str:
    """Each objective shared over the same unshared, and over TRL on the long pair."""
    cells = []
    for (short, label, share), row in rows.items():
        if share:
            cells.append([f"{short:,}", label, *_quotients(row, rows[short, label, False])])
            if trl := rows.get((short, TRL, False)):
                cells.append([f"{short:,}", f"{label} / {TRL}", *_quotients(row, trl)])
    return table(("S", "shared / unshared", "CPU time", "step time", "tokens", "FLOPs", "peak memory"), cells)


def _quotients(row: Row, other: Row) -> Iterator[str]:
    for key in ("cpu_seconds", "seconds"):
        yield f"{median(row[key]) / median(other[key]):.3f}"
    for key in ("tokens_per_step", "flops_per_step", "allocated_bytes"):
        yield f"{row[key] / other[key]:.3f}"


def over_target(rows: Cases) -> Iterator[str]:
    """Cases whose shared step takes more of the unshared one's processor time than it should.

    Where both answers share the long prompt, that is `PAIR_TARGET`. SoLoPO shares the short prompt alone: it may take
    `SLACK` more than its share of the FLOPs.
    """
    for (short, label, share), row in rows.items():
        if not share or label == SHORT_PO:  # short sequences are mostly the work of a step that no prompt changes
            continue
        other = rows[short, label, False]
        target = row["flops_per_step"] / other["flops_per_step"] + SLACK if label == SOLOPO else PAIR_TARGET
        found = median(row["cpu_seconds"]) / median(other["cpu_seconds"])
        if found > target:
            yield f"{label}, S {short:,}: takes {found:.3f} of the unshared time, target {target:.3f}"


def disagreements(rows: Cases) -> Iterator[str]:
    """Cases whose gradient differs between shared and separate prompts."""
    for (short, label, share), row in rows.items():
        other = rows[short, label, False]["grad_norms"][0]
        if share and abs(row["grad_norms"][0] - other) > AGREEMENT * other:
            yield f"{label}, S {short:,}: the norm of the gradient is {row['grad_norms'][0]:.6g}, unshared {other:.6g}"


@click.command(help=__doc__)
@comparison_options(long_tokens=2048, response_tokens=64, steps=3)
@click.option("--short-tokens", type=click.IntRange(2), multiple=True, default=(256, 512), show_default=True)
def main(
    shape: str,
    long_tokens: int,
    short_tokens: tuple[int, ...],
    response_tokens: int,
    rounds: int,
    steps: int,
    without_trl: bool,
    json_path: Path | None,
) -> None:
    sizes = {"long_tokens": [long_tokens], "response_tokens": response_tokens, "triplets": 1, "warmup": 2}
    sizes |= {"steps": steps, "trl_variants": ["sdpa"], "every_variant": False, "profile": None}
    for short in short_tokens:
        check([LONG_PO] if without_trl else [TRL], short, [long_tokens], response_tokens)
    result = environment(("torch", "megatron-core", "transformers", "trl"))
    found: dict[tuple[int, str, bool], list[Row]] = {}
    for number in range(rounds):
        for short in short_tokens:
            for label, share, system, overrides in cases(not without_trl):
                row = measure_case(system, shape, overrides, sizes | {"short_tokens": short})
                found.setdefault((short, label, share), []).append(row)
                where = f"S {short:,}, {label}, {'shared' if share else 'unshared'}"
                click.echo(f"[{number + 1}/{rounds}] {where}: {median(row['seconds']):.2f} s per step", err=True)
    rows = {case: merged(each) for case, each in found.items()}
    result["load_average_after"] = os.getloadavg()[0]
    click.echo("\n".join(f"{key}: {value}" for key, value in result.items()))
    click.echo(f"\n{cases_table(rows)}\n\n{ratios_table(rows)}")
    if json_path:
        listed = [row | dict(zip(("short_tokens", "case", "shared"), case, strict=True)) for case, row in rows.items()]
        write_json(json_path, result | {"shape": shape, "sizes": sizes, "cases": listed})
    if wrong := [*disagreements(rows), *over_target(rows)]:
        raise click.ClickException("; ".join(wrong))


if __name__ == "__main__":
    main()
