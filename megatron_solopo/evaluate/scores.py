"""From answers to scores: each sample's, and the means by task, length and depth.

The results file from scored samples.

The results as a table on the terminal.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_solopo import __version__
from megatron_solopo.evaluate.generation import Generated, Generator
from megatron_solopo.evaluate.samples import QA_METRICS, Spec
from megatron_solopo.evaluate.settings import LongContextSettings
from megatron_solopo.evaluate.statistics import estimate
from megatron_solopo.evaluate.target import Target
from megatron_solopo.generate.scoring import SCORERS, Score, final_answer
from megatron_solopo.results.long_context import Cell, LongContextResults, SkippedSamples


@dataclass(frozen=True)
class Scored:
    """One sample with its answer and scores.

    Attributes:
        marked: Whether the marker of a final answer was found, where it was looked for; None elsewhere.
    """

    spec: Spec
    generated: Generated
    scores: dict[Score, float]
    marked: bool | None


def score(spec: Spec, generated: Generated, metrics: Sequence[Score], marker: str | None) -> Scored:
    """Score an answer; of questions what stands behind the marker, where it is, if there is a marker to look for."""
    text, marked = generated.text, None
    if marker is not None and tuple(metrics) == QA_METRICS:
        text, marked = final_answer(text, marker)
    return Scored(spec, generated, {name: SCORERS[name](text, generated.answers) for name in metrics}, marked)


def cells(scored: Sequence[Scored], metrics: Mapping[str, Sequence[Score]]) -> list[Cell]:
    """Every cell of `evaluation_results.LongContextResults.cells`."""
    return [
        _cell(task, metric, length, depth, group)
        for task, names in metrics.items()
        for metric in names
        for length, depth, group in _groups([each for each in scored if each.spec.task == task])
    ]


def _groups(scored: Sequence[Scored]) -> Iterator[tuple[int | None, float | None, list[Scored]]]:
    """All together, by length, by depth, and by both."""
    lengths = sorted({each.spec.length for each in scored})
    depths = sorted({each.spec.depth for each in scored if each.spec.depth is not None})
    for length in (None, *lengths):
        for depth in (None, *depths):
            group = [each for each in scored if length in (None, each.spec.length) and depth in (None, each.spec.depth)]
            if group:
                yield length, depth, group


def _cell(task: str, metric: Score, length: int | None, depth: float | None, group: Sequence[Scored]) -> Cell:
    found = estimate([each.scores[metric] for each in group])
    return Cell(
        task=task,
        metric=metric,
        length=length,
        depth=depth,
        n=len(group),
        score=found.mean,
        low=found.low,
        high=found.high,
        interval=found.interval,
        prompt_tokens=sum(each.spec.prompt_tokens for each in group),
        generated_tokens=sum(each.generated.tokens for each in group),
        seconds=sum(each.generated.seconds for each in group),
    )


def make_results(
    settings: LongContextSettings,
    target: Target,
    name: str,
    metrics: Mapping[str, Sequence[Score]],
    max_positions: int | None,
    scored: Sequence[Scored],
    skipped: Sequence[SkippedSamples],
    model: Generator,
) -> LongContextResults:
    """All that is known of an evaluation."""
    found = cells(scored, metrics)
    return LongContextResults(
        name=name,
        model=str(target.path or settings.model),
        backend=target.backend,
        run_dir=None if target.run_dir is None else str(target.run_dir),
        step=target.step,
        main_metrics={task: names[0] for task, names in metrics.items()},
        lengths=sorted({cell.length for cell in found if cell.length is not None}),
        depths=sorted({cell.depth for cell in found if cell.depth is not None}),
        cells=found,
        skipped=list(skipped),
        max_positions=max_positions,
        samples=len(scored),
        prompt_tokens=sum(each.spec.prompt_tokens for each in scored),
        generated_tokens=sum(each.generated.tokens for each in scored),
        seconds=sum(each.generated.seconds for each in scored),
        layout=model.layout,
        device=model.device,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        command=shlex.join(sys.argv),
        settings={option: _plain(value) for option, value in asdict(settings).items()},
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def render(results: LongContextResults) -> str:
    """A line per task and metric, a column per length: mean score and 95 % interval in percent, and samples."""
    rows = [["task", "metric", *map(str, results.lengths), "all"]]
    for task, metric in dict.fromkeys((cell.task, cell.metric) for cell in results.cells):
        found = [results.cell(task, metric, length=length) for length in (*results.lengths, None)]
        rows.append([task, metric, *map(_shown, found)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    skipped = [
        f"skipped: {each.n} of {each.task}{'' if each.length is None else f' at {each.length}'}: {each.reason}"
        for each in results.skipped
    ]
    cost = (
        f"{results.samples} samples, {results.prompt_tokens:,} prompt tokens, {results.generated_tokens:,} generated, "
        f"{results.seconds:.1f} s of generation"
    )
    return "\n".join([*lines, *skipped, cost])


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    low, mean, high = (f"{100 * value:.1f}" for value in (cell.low, cell.score, cell.high))
    return f"{mean} [{low}, {high}] n={cell.n}"
