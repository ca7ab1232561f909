"""The tables of RESULTS.md, from `runs.jsonl`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from miniature.evaluate import LENGTHS
from miniature.plan import ALPHAS, HIGH_RATE, LOSS_TYPES, MAP_ALPHAS, MIDDLE, STRONG, WEAK
from miniature.results import Result, Results, paired, spread
from miniature.runs import LEARNING_RATE, Run
from tools.reporting import LEFT, fill_tables, table

METHODS = {
    "short_po": lambda run: run.method == "short_po",
    "long_po": lambda run: run.method == "long_po",
    "solopo": lambda run: run.method == "solopo" and run.align == "chosen",
    "solopo, both": lambda run: run.method == "solopo" and run.align == "both",
}
"""Columns of the comparison, by their names."""
SETTINGS = ((WEAK, LEARNING_RATE), (WEAK, HIGH_RATE), (MIDDLE, LEARNING_RATE), (STRONG, LEARNING_RATE))
"""Base strength and learning rate of the failure map."""
HARM_BANDS = (
    ("less than 5 %", -math.inf, 0.05),
    ("5 to 10 %", 0.05, 0.1),
    ("10 to 25 %", 0.1, 0.25),
    ("more", 0.25, math.inf),
)
"""Share of the base's short accuracy that a run lost."""
Table = Callable[[Results], str]


def regenerate(document: str, runs: Path, tables: Mapping[str, Table]) -> str:
    """The document with these tables written anew."""
    results = Results(runs)
    return fill_tables(document, {name: make(results) for name, make in tables.items()})


def chosen(results: Results, strength: int, loss_type: str, method: str) -> list[Result]:
    """The seeds of one method as the paper sets it."""
    return results.where(
        lambda each: (
            each.run.strength == strength
            and each.run.loss_type == loss_type
            and each.is_default
            and METHODS[method](each.run)
        )
    )


def comparison(results: Results) -> str:
    """Accuracy by length of every method."""

    def rows() -> Iterator[Sequence[str]]:
        base = results.where(lambda each: each.run.method == "base" and each.run.strength == STRONG)
        yield ["", "base", str(len(base)), *by_length(base)]
        for loss_type in LOSS_TYPES:
            for method in METHODS:
                found = chosen(results, STRONG, loss_type, method)
                yield [loss_type, method, str(len(found)), *by_length(found)]

    return table(["loss", "method", "seeds", *map(str, LENGTHS)], rows(), LEFT)


def by_length(found: Sequence[Result]) -> list[str]:
    """Mean and deviation of each length."""
    return [spread(each.accuracy[length] for each in found) for length in LENGTHS]


def differences(results: Results) -> str:
    """SoLoPO against the baselines, seed by seed, and the cost."""

    def rows() -> Iterator[Sequence[str]]:
        for loss_type in LOSS_TYPES:
            solopo = chosen(results, STRONG, loss_type, "solopo")
            base = [results.base_of(each).short for each in solopo]
            others = [chosen(results, STRONG, loss_type, each) for each in ("short_po", "long_po", "solopo, both")]
            yield [
                loss_type,
                *(paired(*([each.long for each in side] for side in (solopo, other))) for other in others),
                paired([each.short for each in solopo], base),
            ]

    return table(["loss", "less short_po", "less long_po", "less both aligned", "short, less the base"], rows(), LEFT)


def cost(results: Results) -> str:
    """Tokens, FLOPs and time of a run."""

    def rows() -> Iterator[Sequence[str]]:
        whole = chosen(results, STRONG, LOSS_TYPES[0], "long_po")[0].recorded
        for method in METHODS:
            found = [each.recorded for each in chosen(results, STRONG, LOSS_TYPES[0], method)]
            tokens, flops = found[0]["tokens"], found[0]["flops"]
            seconds = min(each["step_seconds"] for each in found)
            yield [
                method,
                f"{tokens:,}",
                f"{tokens / whole['tokens']:.0%}",
                f"{flops / 1e9:.0f}",
                f"{flops / whole['flops']:.0%}",
                f"{1000 * seconds:.0f}",
            ]

    return table(["method", "tokens", "of long_po", "GFLOPs", "of long_po", "ms, fastest step"], rows(), LEFT)


def alpha(results: Results) -> str:
    """Accuracy by weight of the alignment, from the strong base."""

    def rows() -> Iterator[Sequence[str]]:
        for loss_type in LOSS_TYPES:
            for weight in ALPHAS:
                found = like(results, Run(STRONG, 0, "solopo", loss_type, weight))
                yield [loss_type, f"{weight:g}", str(len(found)), *by_length(found)]

    return table(["loss", "alpha", "seeds", *map(str, LENGTHS)], rows(), LEFT)


def like(results: Results, run: Run) -> list[Result]:
    """The seeds of a setting."""
    return results.where(lambda each: replace(each.run, seed=run.seed) == run)


def failures(results: Results) -> str:
    """Short and long accuracy over base strength, learning rate, loss and alpha, with and without `detach_short`."""
    outcome = ["seeds", "short", "long", "harmed"]
    head = ["base", "lr", "loss", "", *outcome, *(f"detached: {each}" for each in outcome)]
    return table(head, (row for strength, rate in SETTINGS for row in _failures_from(results, strength, rate)), LEFT)


def _failures_from(results: Results, strength: int, rate: float) -> Iterator[Sequence[str]]:
    """The rows of one base and learning rate of which there are runs."""
    place = [f"{strength} %", f"{rate:g}"]
    if found := like(results, Run(strength, 0, "base")):
        yield [*place, "", "base", *_outcome(results, found)[:3], *[""] * 5]
    for loss_type in LOSS_TYPES:
        for method in ("short_po", "long_po"):
            if found := like(results, Run(strength, 0, method, loss_type, learning_rate=rate)):
                yield [*place, loss_type, method, *_outcome(results, found), *[""] * 4]
        for weight in MAP_ALPHAS:
            pair = [like(results, aligned(strength, rate, loss_type, weight, detached)) for detached in (False, True)]
            if any(pair):
                cells = [cell for found in pair for cell in _outcome(results, found)]
                yield [*place, loss_type, f"alpha {weight:g}", *cells]


def aligned(strength: int, rate: float, loss_type: str, weight: float, detached: bool) -> Run:
    """A cell of the failure map, of seed 0."""
    return Run(strength, 0, "solopo", loss_type, weight, detach_short=detached, learning_rate=rate)


def _outcome(results: Results, found: Sequence[Result]) -> list[str]:
    harmed = sum(map(results.harmed, found))
    return [
        str(len(found)),
        spread(each.short for each in found),
        spread(each.long for each in found),
        f"{harmed} of {len(found)}" if found else "-",
    ]


def warnings(results: Results) -> str:
    """How often the trainer's warning fires on runs that did harm and on others."""

    def rows() -> Iterator[Sequence[str]]:
        solopo = results.where(
            lambda each: each.run.method == "solopo" and each.run.alpha != 0 and each.run.rank is None
        )
        for name, low, high in HARM_BANDS:
            lost = [each for each in solopo if low <= results.lost(each) < high]
            by_loss = [[each for each in lost if each.run.loss_type == loss_type] for loss_type in LOSS_TYPES]
            yield [name, *map(_fired, by_loss), _fired(lost)]

    return table(["short accuracy lost", *LOSS_TYPES, "all"], rows(), LEFT)


def _fired(found: Sequence[Result]) -> str:
    return f"{sum(each.warned_at() is not None for each in found)} of {len(found)}" if found else "-"


TABLES: dict[str, Table] = {
    "comparison": comparison,
    "differences": differences,
    "cost": cost,
    "alpha": alpha,
    "failures": failures,
    "warnings": warnings,
}
