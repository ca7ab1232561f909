"""The tables of RESULTS.md, from `runs.jsonl`."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from miniature.evaluate import LENGTHS
from miniature.plan import ALPHAS, LOSS_TYPES, MAP_ALPHAS, STRENGTHS, STRONG
from miniature.results import Result, Results, paired, spread
from miniature.runs import Run

METHODS = {
    "short_po": lambda run: run.method == "short_po",
    "long_po": lambda run: run.method == "long_po",
    "solopo": lambda run: run.method == "solopo" and run.align == "chosen",
    "solopo, both": lambda run: run.method == "solopo" and run.align == "both",
}
"""Columns of the comparison, by their names."""
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def regenerate(document: str, runs: Path) -> str:
    """The document with every `<!-- table: NAME -->` block written anew."""
    results = Results(runs)
    return _BLOCK.sub(lambda block: block[1] + "\n".join(TABLES[block[2]](results)) + "\n" + block[3], document)


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


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


def comparison(results: Results) -> Iterator[str]:
    """Accuracy by length of every method."""

    def rows() -> Iterator[Sequence[str]]:
        base = results.where(lambda each: each.run.method == "base" and each.run.strength == STRONG)
        yield ["", "base", str(len(base)), *_by_length(base)]
        for loss_type in LOSS_TYPES:
            for method in METHODS:
                found = chosen(results, STRONG, loss_type, method)
                yield [loss_type, method, str(len(found)), *_by_length(found)]

    return _table(["loss", "method", "seeds", *map(str, LENGTHS)], rows())


def _by_length(found: Sequence[Result]) -> list[str]:
    return [spread(each.accuracy[length] for each in found) for length in LENGTHS]


def differences(results: Results) -> Iterator[str]:
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

    return _table(["loss", "less short_po", "less long_po", "less both aligned", "short, less the base"], rows())


def cost(results: Results) -> Iterator[str]:
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

    return _table(["method", "tokens", "of long_po", "GFLOPs", "of long_po", "ms, fastest step"], rows())


def alpha(results: Results) -> Iterator[str]:
    """Accuracy by weight of the alignment, from the strong base."""

    def rows() -> Iterator[Sequence[str]]:
        for loss_type in LOSS_TYPES:
            for weight in ALPHAS:
                found = _solopo(results, Run(STRONG, 0, "solopo", loss_type, weight))
                yield [loss_type, f"{weight:g}", str(len(found)), *_by_length(found)]

    return _table(["loss", "alpha", "seeds", *map(str, LENGTHS)], rows())


def _solopo(results: Results, like: Run) -> list[Result]:
    """The seeds of a chosen-aligned setting."""
    return results.where(
        lambda each: (
            each.run
            == Run(like.strength, each.run.seed, "solopo", like.loss_type, like.alpha, "chosen", like.detach_short)
        )
    )


def failures(results: Results) -> Iterator[str]:
    """Short and long accuracy over base strength, loss and alpha, with and without `detach_short`."""

    def rows() -> Iterator[Sequence[str]]:
        for strength in STRENGTHS:
            for loss_type in LOSS_TYPES:
                for method in ("short_po", "long_po"):
                    found = chosen(results, strength, loss_type, method)
                    yield [*_before(results, strength), loss_type, method, *_outcome(results, found), "", "", "", ""]
                for weight in MAP_ALPHAS:
                    runs = [Run(strength, 0, "solopo", loss_type, weight, detach_short=each) for each in (False, True)]
                    cells = [cell for run in runs for cell in _outcome(results, _solopo(results, run))]
                    yield [*_before(results, strength), loss_type, f"{weight:g}", *cells]

    outcome = ["seeds", "short", "long", "collapsed"]
    head = ["base", "its short", "its long", "loss", "alpha", *outcome, *(f"detached: {each}" for each in outcome)]
    return _table(head, rows())


def _before(results: Results, strength: int) -> list[str]:
    bases = results.where(lambda each: each.run.method == "base" and each.run.strength == strength)
    return [f"{strength} %", spread(each.short for each in bases), spread(each.long for each in bases)]


def _outcome(results: Results, found: Sequence[Result]) -> list[str]:
    if not found:
        return ["0", "-", "-", "-"]
    collapsed = sum(map(results.collapsed, found))
    return [
        str(len(found)),
        spread(each.short for each in found),
        spread(each.long for each in found),
        f"{collapsed} of {len(found)}",
    ]


def warnings(results: Results) -> Iterator[str]:
    """How often the trainer's warning fires on runs that collapse and on others."""

    def rows() -> Iterator[Sequence[str]]:
        for loss_type in LOSS_TYPES:
            solopo = results.where(lambda each: each.run.method == "solopo" and each.run.loss_type == loss_type)  # noqa: B023
            cells = []
            for wanted in (True, False):
                steps = [each.warned_at() for each in solopo if results.collapsed(each) == wanted]
                cells.append(f"{sum(step is not None for step in steps)} of {len(steps)}")
            fired = sorted(step for each in solopo if results.collapsed(each) and (step := each.warned_at()))
            yield [loss_type, *cells, str(fired[len(fired) // 2]) if fired else "-"]

    return _table(["loss", "warned, collapsed", "warned, not collapsed", "median step of the warning"], rows())


TABLES: dict[str, Callable[[Results], Iterator[str]]] = {
    "comparison": comparison,
    "differences": differences,
    "cost": cost,
    "alpha": alpha,
    "failures": failures,
    "warnings": warnings,
}
