"""How much of a planned batch is padding, waiting pipeline stages and uneven work; arithmetic only, no model runs.

    python -m tools.benchmarks.packing_shares

Every row compares a simple rule with the rule that training uses, on the same batch:

- padding: every sequence padded to 2 x CP x TP; or sequences to 2 x CP, and packs to what TP needs.
- waiting: as few packs as the budget allows; or at least 4 x PP packs on each rank. `plan` simulates the schedule.
- waiting in a pass: the pipeline runs empty behind every 16 triplets of a rank, with as few packs as the budget allows
  or with 4 x PP packs; or it runs empty behind 24 x PP packs at most. The figure is the share of time that
  stages work.
- uneven work: ranks share the sum of squared lengths; or they share FLOPs. The figure is the FLOPs of the rank with
  most work over the mean.
"""

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from megatron_solopo.architecture.huggingface_config import ModelShape, read_architecture
from megatron_solopo.architecture.layout import pack_multiple, packs_per_part, sequence_multiple, wanted_packs
from megatron_solopo.architecture.pipeline_schedule import ChunkPass
from megatron_solopo.config import ObjectiveConfig
from megatron_solopo.data.batch_plan import (
    IntArray,
    TripletSize,
    TripletSizes,
    padded_lengths,
    plan_global_batch,
    plan_single_pass,
    share_out_pass,
    triplet_sizes,
)
from megatron_solopo.plan.pipeline import simulate_schedule
from tools.reporting import environment, table

_MODELS = Path(__file__).resolve().parents[2] / "examples" / "plans" / "models"
_ROLES = ObjectiveConfig().roles.all
_BUDGET = 139_264
_SEEDS = range(5)


@click.command(help=__doc__)
def main() -> None:
    """Print the four tables."""
    click.echo("\n".join(f"{name}: {value}" for name, value in environment().items()))
    click.echo("\n## Padding\n\nLong sequences of 4K to 12K tokens, short ones of 0.5K to 1.5K; 4,096 triplets.\n")
    padding = [(tp, cp, *padding_shares(tp, cp)) for tp, cp in ((8, 16), (8, 8), (4, 4), (8, 1))]
    rows = [[f"{tp}", f"{cp}", f"{before:.2%}", f"{after:.2%}"] for tp, cp, before, after in padding]
    click.echo(table(["TP", "CP", "2 x CP x TP", "2 x CP"], rows))
    click.echo(
        "\n## Waiting pipeline stages\n\n64 triplets of 8K tokens on 8 data-parallel ranks, backward twice forward.\n"
    )
    bubbles = [(pp, *bubble_shares(pp)) for pp in (2, 4, 8)]
    rows = [[f"{pp}", *(f"{packs}: {share:.1%}" for packs, share in found)] for pp, *found in bubbles]
    click.echo(table(["PP", "fewest packs: share", "wanted packs: share"], rows))
    click.echo("\n## Waiting pipeline stages of a pass\n\n512 triplets on each data-parallel rank, forward only.\n")
    cases = ((4, 8192), (8, 8192), (8, 32768))
    rows = [[f"{pp}, {length // 1024}K", *map("{:.2f}".format, pass_shares(pp, length))] for pp, length in cases]
    click.echo(table(["PP, tokens", "16 triplets", "16 triplets, wanted packs", "at most 24 x PP packs"], rows))
    click.echo("\n## Uneven work\n\n64 triplets on 8 data-parallel ranks, log-uniform long contexts, five batches.\n")
    models = (("llama-3.1-8b", 4096, 32768), ("llama-3.1-70b", 8192, 32768))
    rows = [
        [f"{name}, {low // 1024}K to {high // 1024}K", *(_range(found) for found in uneven_work(name, low, high))]
        for name, low, high in models
    ]
    click.echo(table(["batch", "squared lengths", "FLOPs"], rows))


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _batch(model: ModelShape, long: IntArray, multiple: int, seed: int) -> tuple[list[TripletSize], IntArray]:
    """Sizes of triplets whose short context is an eighth of the long one, and their sums of squared lengths."""
    generator = np.random.default_rng(seed)
    prompts = {"short": long // 8, "long": long}
    responses = {name: generator.integers(50, 500, len(long)) for name in ("chosen", "rejected")}
    sizes = triplet_sizes(prompts, responses, _ROLES, multiple, model, share_prompts=False)
    lengths = [prompts[role.context] + responses[role.response] for role in _ROLES]
    squares = np.square(padded_lengths(np.stack(lengths), multiple)).sum(axis=0)
    return sizes.select(np.arange(len(long))), squares


def padding_shares(tp: int, cp: int) -> tuple[float, float]:
    """Share of padding in the packs, when sequences are padded for TP and CP and when they are padded for CP alone."""
    model = read_architecture(_MODELS / "llama-3.1-8b")
    long = np.random.default_rng(0).integers(4096, 12288, 4096)
    shares = []
    for multiple, whole in ((2 * cp * tp, 1), (sequence_multiple(cp), pack_multiple(tp, cp))):
        sizes, _ = _batch(model, long, multiple, seed=0)
        packs = plan_global_batch(sizes, max_tokens=_BUDGET // whole * whole, max_triplets=None, num_ranks=8)
        positions = [sum(sizes[i].padded_tokens for i in pack) for rank in packs for pack in rank]
        shares.append(1 - sum(size.tokens for size in sizes) / int(padded_lengths(np.array(positions), whole).sum()))
    return shares[0], shares[1]


def bubble_shares(pp: int) -> tuple[tuple[int, float], tuple[int, float]]:
    """(packs per rank, share of waiting) with the fewest packs, and with those that a pipeline wants."""
    model = read_architecture(_MODELS / "llama-3.1-70b")
    sizes, _ = _batch(model, np.full(64, 8192 - 500), 1, seed=0)
    found = []
    for wanted in (1, wanted_packs(pp)):
        plan = plan_global_batch(sizes, max_tokens=_BUDGET, max_triplets=None, num_ranks=8, wanted_packs=wanted)
        seconds = [float(sum(sizes[i].cost for i in pack)) for pack in plan[0]]

        def pass_seconds(rank: int, work: ChunkPass, seconds: list[float] = seconds) -> float:
            return seconds[work.microbatch] * (1 if work.is_forward else 2)

        found.append((len(seconds), simulate_schedule(pp, 1, len(seconds), pass_seconds, 0.0).bubble))
    return found[0], found[1]


def pass_shares(pp: int, length: int) -> tuple[float, float, float]:
    """Share of time that stages work in a pass: two ways to run empty every 16 triplets, and that of today's passes."""
    model = read_architecture(_MODELS / "llama-3.1-70b")
    chosen = _batch(model, np.full(512, length - 500), 1, seed=0)[0]
    shares = []
    for wanted in (1, wanted_packs(pp)):
        rounds = []
        for start in range(0, len(chosen), 16):
            sizes = chosen[start : start + 16]
            (packs,) = plan_global_batch(sizes, max_tokens=_BUDGET, max_triplets=None, num_ranks=1, wanted_packs=wanted)
            rounds.append([sum(sizes[i].cost for i in pack) for pack in packs])
        shares.append(_busy_share(rounds, pp))
    padded, tokens, cost = (np.array(column) for column in zip(*chosen, strict=True))
    whole_pass = TripletSizes(padded, tokens, cost, *[tokens] * 3)  # the others are not read
    packs_of_pass = plan_single_pass(
        whole_pass, max_tokens=_BUDGET, max_triplets=None, num_ranks=1, wanted_packs=packs_per_part(pp)
    )
    costs = [int(whole_pass.cost[pack].sum()) for pack in packs_of_pass]
    parts = share_out_pass(costs, num_ranks=1, packs_per_part=packs_per_part(pp))
    return shares[0], shares[1], _busy_share([[costs[number] for number in part.packs[0]] for part in parts], pp)


def _busy_share(rounds: Sequence[Sequence[int]], pp: int) -> float:
    """Work over time of a pipeline whose stages are alike, and which runs empty behind every round of packs."""
    elapsed = 0
    for packs in rounds:
        free = [0] * pp
        for seconds in packs:
            arrived = 0
            for stage in range(pp):
                arrived = free[stage] = max(free[stage], arrived) + seconds
        elapsed += free[-1]
    return sum(map(sum, rounds)) / elapsed


def uneven_work(name: str, low: int, high: int) -> tuple[list[float], list[float]]:
    """FLOPs of the rank with most work over the mean, when ranks share squared lengths and when they share FLOPs."""
    model = read_architecture(_MODELS / name)
    found: tuple[list[float], list[float]] = ([], [])
    for seed in _SEEDS:
        long = np.exp(np.random.default_rng(seed).uniform(np.log(low), np.log(high), 64)).astype(np.int64)
        sizes, squares = _batch(model, long, 1, seed)
        by_squares = [size._replace(cost=int(square)) for size, square in zip(sizes, squares, strict=True)]
        for shares, shared in zip(found, (by_squares, sizes), strict=True):
            plan = plan_global_batch(shared, max_tokens=_BUDGET, max_triplets=None, num_ranks=8)
            loads = [sum(sizes[i].cost for pack in rank for i in pack) for rank in plan]
            shares.append(max(loads) / float(np.mean(loads)))
    return found


if __name__ == "__main__":
    main()
