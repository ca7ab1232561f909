"""From answers to scores: each sample's, and the means by task, length and depth."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_solopo.data.scoring import SCORERS, Score, final_answer
from megatron_solopo.evaluate.generation import Generated
from megatron_solopo.evaluate.samples import QA_METRICS, Spec
from megatron_solopo.evaluate.statistics import estimate
from megatron_solopo.evaluation_results import Cell


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
