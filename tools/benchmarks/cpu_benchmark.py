#!/usr/bin/env python3
"""Measure on a CPU what the response-only head saves in memory and what short-to-long training saves in time.

    python -m tools.benchmarks.cpu_benchmark --json benchmark.json

Memory: forward and backward of one SoLo-DPO triplet, each in a fresh process, with the response-only head and with
full logits (Megatron's own output layer and cross-entropy over every position), which must give the same loss and
gradients. Time: whole optimizer steps of `solopo` and of `long_po` on the same triplets. Data and weights are random;
reference log-probs are zeros, for a cached reference costs a step nothing. One thread; Linux only.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import psutil

from megatron_solopo.files import write_json
from tools.benchmarks.step_costs import HEADS, OBJECTIVES, Memory, Times, disagreement, measure_memory, measure_times
from tools.reporting import GIB, environment, table

AGREEMENT = 1e-4
"""Greatest relative difference of loss and gradient norms between the heads."""
_PAIRS = ((1024, 4096), (2048, 4096), (1024, 8192))
_MIB = 2**20
# It imports torch and megatron once; every measurement is then a fork of it.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["megatron_solopo.train.policy"])


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that has imported libraries and done nothing else; hand back its result."""
    with ProcessPoolExecutor(1, mp_context=_CONTEXT) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise click.ClickException(
                f"the process of {function.__name__}{arguments} was killed, most likely for want of memory; "
                "choose a smaller --vocab-size or --prompt-tokens"
            ) from None


def memory_table(rows: Sequence[Memory]) -> str:
    sizes = ("step, resident MiB", "step, tensors MiB", "head alone, tensors MiB")
    cells = [
        [f"{row.prompt_tokens:,}", row.head, f"{row.positions:,}"]
        + [f"{n / _MIB:,.1f}" for n in (row.step_resident_bytes, row.step_tensor_bytes, row.head_tensor_bytes)]
        + [f"{row.loss:.6f}"]
        for row in rows
    ]
    return table(("prompt tokens", "head", "positions", *sizes, "loss"), cells)


def times_table(rows: Sequence[Times]) -> str:
    ratios = ("ratio, wall", "ratio, CPU time", "(L+2S)/2L", "ratio of FLOPs")
    cells = [
        [f"{row.short_tokens:,}", f"{row.long_tokens:,}"]
        + [f"{row.wall_seconds[objective.name]:.2f}" for objective in OBJECTIVES]
        + [f"{ratio:.3f}" for ratio in (row.wall_ratio, row.cpu_ratio, row.tokens_ratio, row.flops_ratio)]
        for row in rows
    ]
    return table(("S", "L", "solopo s", "long_po s", *ratios), cells)


def check_sizes(prompt_tokens: Sequence[int], pairs: Sequence[tuple[int, int]], response: int, vocab: int) -> None:
    """Raise click.UsageError for sizes that cannot be measured here."""
    if vocab % 128:
        raise click.UsageError(f"--vocab-size={vocab}: full logits would score padding; choose a multiple of 128")
    for short, long in pairs:
        if not response < short <= long:
            raise click.UsageError(f"--pair {short} {long}: needs --response-tokens ({response}) < S <= L")
    needed, available = 1.5 * max(prompt_tokens) * vocab * 4, psutil.virtual_memory().available
    if needed > available:
        raise click.UsageError(
            f"full logits of {max(prompt_tokens):,} tokens need about {needed / GIB:.1f} GiB and "
            f"{available / GIB:.1f} GiB are available; choose a smaller --vocab-size or --prompt-tokens"
        )


@click.command(help=__doc__.replace("    python", "\b\n    python"))
@click.option("--prompt-tokens", type=click.IntRange(2), multiple=True, default=(16384, 32768), show_default=True)
@click.option("--vocab-size", default=32000, show_default=True, help="Of the memory measurement.")
@click.option("--pair", "pairs", type=(int, int), multiple=True, default=_PAIRS, show_default=True)
@click.option("--response-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of each answer.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Steps timed per objective.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
def main(
    prompt_tokens: tuple[int, ...],
    vocab_size: int,
    pairs: tuple[tuple[int, int], ...],
    response_tokens: int,
    repeats: int,
    json_path: Path | None,
) -> None:
    """Measure, print tables, write JSON."""
    check_sizes(prompt_tokens, pairs, response_tokens, vocab_size)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # what libraries tell each other, once per process
    result = environment()
    work: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (measure_memory, (head, tokens, response_tokens, vocab_size)) for tokens in prompt_tokens for head in HEADS
    ]
    work += [(measure_times, (short, long, response_tokens, repeats)) for short, long in pairs]
    rows = []
    for number, (function, arguments) in enumerate(work, start=1):
        started = time.monotonic()
        rows.append(in_fresh_process(function, *arguments))
        seconds = time.monotonic() - started
        click.echo(f"[{number}/{len(work)}] {function.__name__}{arguments}: {seconds:.0f} s", err=True)
    memory, times = rows[: -len(pairs)], rows[-len(pairs) :]
    worst = max(disagreement(one, other) for one, other in zip(memory[::2], memory[1::2], strict=True))
    result["load_average_after"] = os.getloadavg()[0]
    click.echo("\n".join(f"{key}: {value}" for key, value in result.items()))
    click.echo(f"\n{memory_table(memory)}\n\nGreatest relative difference between the heads: {worst:.1e}\n")
    click.echo(times_table(times))
    if json_path:
        result |= {"memory": [asdict(row) for row in memory], "times": [asdict(row) for row in times]}
        write_json(json_path, result)
    if worst > AGREEMENT:
        raise click.ClickException(f"the heads disagree by {worst:.1e}, more than {AGREEMENT:.0e}")


if __name__ == "__main__":
    main()
