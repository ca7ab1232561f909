"""The tables of RESULTS.md about adapters, from `lora.jsonl`."""

from collections.abc import Iterator, Sequence
from itertools import product

from miniature.evaluate import LENGTHS
from miniature.plan import (
    LORA_LOSS_TYPES,
    LORA_METHODS,
    LORA_RANKS,
    LORA_RATE,
    LORA_RATES,
    STRONG,
    lora,
    lora_trial,
)
from miniature.results import Result, Results, paired
from miniature.tables import Table, by_length, chosen, like
from tools.reporting import LEFT, table

TRAINED = (None, *LORA_RANKS)
"""The whole model, and the ranks of adapters."""


def lora_runs(results: Results, loss_type: str, rank: int | None, method: str) -> list[Result]:
    """The seeds of one method with adapters of a rank, or of the whole model."""
    if rank is None:
        return chosen(results, STRONG, loss_type, method)
    run = next(run for run in lora(0, LORA_RATE, [loss_type], [method]) if run.rank == rank)
    return like(results, run)


def trained(rank: int | None) -> str:
    """What a run with adapters of this rank trains; None is a run without."""
    return "whole model" if rank is None else f"rank {rank}"


def lora_comparison(results: Results) -> str:
    """Accuracy by length of adapters and of the whole model."""

    def rows() -> Iterator[Sequence[str]]:
        base = results.where(lambda each: each.run.method == "base" and each.run.strength == STRONG)
        yield ["", "", "base", str(len(base)), *by_length(base)]
        for loss_type, rank, method in product(LORA_LOSS_TYPES, TRAINED, LORA_METHODS):
            found = lora_runs(results, loss_type, rank, method)
            yield [loss_type, trained(rank), method, str(len(found)), *by_length(found)]

    return table(["loss", "trained", "method", "seeds", *map(str, LENGTHS)], rows(), LEFT)


def lora_differences(results: Results) -> str:
    """SoLoPO against the baselines of the same rank and against the whole model, seed by seed."""

    def rows() -> Iterator[Sequence[str]]:
        for loss_type, rank in product(LORA_LOSS_TYPES, TRAINED):
            whole = [each.long for each in lora_runs(results, loss_type, None, "solopo")]
            short_po, long_po, solopo = (lora_runs(results, loss_type, rank, method) for method in LORA_METHODS)
            long = [each.long for each in solopo]
            yield [
                loss_type,
                trained(rank),
                *(paired(long, [each.long for each in others]) for others in (short_po, long_po)),
                "" if rank is None else paired(long, whole),
                paired([each.short for each in solopo], [results.base_of(each).short for each in solopo]),
            ]

    heads = ["loss", "trained", "less short_po", "less long_po", "less the whole model", "short, less the base"]
    return table(heads, rows(), LEFT)


def lora_rates(results: Results) -> str:
    """Short and long accuracy of the trial runs by rank and learning rate."""

    def rows() -> Iterator[Sequence[str]]:
        for rank in LORA_RANKS:
            for rate in LORA_RATES:
                runs = [run for run in lora_trial(rate) if run.rank == rank]
                found = results.where(lambda each, runs=runs: each.run in runs)
                by_method = {each.run.method: each for each in found}
                cells = [f"{value:.2f}" for run in runs for value in _short_and_long(by_method[run.method])]
                yield [str(rank), f"{rate:g}", *cells]

    heads = [f"{method}: {side}" for method in LORA_METHODS[1:] for side in ("short", "long")]
    return table(["rank", "lr", *heads], rows(), LEFT)


def _short_and_long(result: Result) -> tuple[float, float]:
    return result.short, result.long


LORA_TABLES: dict[str, Table] = {
    "lora_rates": lora_rates,
    "lora_comparison": lora_comparison,
    "lora_differences": lora_differences,
}
