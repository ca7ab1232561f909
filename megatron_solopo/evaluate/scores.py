"""From answers to the results of an evaluation: scores, their means by task, length and depth, the printed table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_solopo.evaluate.sample_set import SampleSet
from megatron_solopo.evaluate.samples import QA_METRICS, SampleSpec
from megatron_solopo.evaluate.statistics import interval_kind, mean_score
from megatron_solopo.evaluate.target import Target
from megatron_solopo.evaluation_settings import LongContextSettings
from megatron_solopo.generate.journal import StoredResponse
from megatron_solopo.generate.model import Traffic
from megatron_solopo.generate.scoring import SCORERS, Score, final_answer
from megatron_solopo.results.long_context import LongContextResults, ScoreCell, SkippedSamples
from megatron_solopo.results.results_file import origin


class EvaluatedResponse(StoredResponse):
    """An answer as the journal holds it; `question_id` is the sample's id, `index` is 0."""

    answers: list[str]
    """The right answers."""
    tokens: int
    """Generated tokens, with the end token."""
    seconds: float
    """The answer's share of the wall time."""


@dataclass(frozen=True)
class ScoredResponse:
    """One sample with its answer and scores.

    Attributes:
        marker_found: Whether the answer has the marker of a final answer; None where it was not looked for.
    """

    spec: SampleSpec
    response: EvaluatedResponse
    scores: dict[Score, float]
    marker_found: bool | None


def score(
    spec: SampleSpec, response: EvaluatedResponse, metrics: Sequence[Score], marker: str | None
) -> ScoredResponse:
    """Score an answer.

    Args:
        marker: Of an answer to a question, only the text behind the last marker is scored, if there is one. None
            scores every answer whole.
    """
    text, marker_found = response.text, None
    if marker is not None and tuple(metrics) == QA_METRICS:
        text, marker_found = final_answer(text, marker)
    scores = {name: SCORERS[name](text, response.answers) for name in metrics}
    return ScoredResponse(spec, response, scores, marker_found)


def score_table(scored: Sequence[ScoredResponse], metrics: Mapping[str, Sequence[Score]]) -> list[ScoreCell]:
    """The means of every score of every task, see `LongContextResults.cells`."""
    return [
        _mean(task, metric, length, depth, group)
        for task, names in metrics.items()
        for metric in names
        for length, depth, group in _groups([each for each in scored if each.spec.task == task])
    ]


def _groups(
    scored: Sequence[ScoredResponse],
) -> Iterator[tuple[int | None, float | None, list[ScoredResponse]]]:
    """All answers, those of each length, of each depth, and of both."""
    lengths = sorted({each.spec.length for each in scored})
    depths = sorted({each.spec.depth for each in scored if each.spec.depth is not None})
    for length in (None, *lengths):
        for depth in (None, *depths):
            group = [each for each in scored if length in (None, each.spec.length) and depth in (None, each.spec.depth)]
            if group:
                yield length, depth, group


def _mean(
    task: str, metric: Score, length: int | None, depth: float | None, group: Sequence[ScoredResponse]
) -> ScoreCell:
    scores = [each.scores[metric] for each in group]
    found = mean_score(scores)
    assert found.low is not None and found.high is not None
    return ScoreCell(
        task=task,
        metric=metric,
        length=length,
        depth=depth,
        n=len(group),
        score=found.mean,
        low=found.low,
        high=found.high,
        interval=interval_kind(scores),
        **_cost(group),
    )


def _cost(scored: Sequence[ScoredResponse]) -> dict[str, Any]:
    return {
        "prompt_tokens": sum(each.spec.prompt_tokens for each in scored),
        "generated_tokens": sum(each.response.tokens for each in scored),
        "seconds": sum(each.response.seconds for each in scored),
    }


def make_results(
    settings: LongContextSettings,
    target: Target,
    name: str,
    samples: SampleSet,
    scored: Sequence[ScoredResponse],
    skipped: Sequence[SkippedSamples],
    files: dict[str, str],
    device: str,
    layout: dict[str, int],
) -> LongContextResults:
    """The file of results.

    Args:
        name: Of the file, without its ending.
        files: Hashes by path, as the journal of the answers states them.
        device: What computed; "server" where that is not known.
        layout: Parallel sizes, empty where there are none.
    """
    table = score_table(scored, samples.metrics)
    return LongContextResults(
        name=name,
        model=str(target.path or settings.model),
        backend=target.backend,
        run_dir=None if target.run_dir is None else str(target.run_dir),
        step=target.step,
        main_metrics={task: names[0] for task, names in samples.metrics.items()},
        lengths=sorted({cell.length for cell in table if cell.length is not None}),
        depths=sorted({cell.depth for cell in table if cell.depth is not None}),
        cells=table,
        skipped=list(skipped),
        max_positions=samples.max_positions,
        samples=len(scored),
        layout=layout,
        device=device,
        settings=settings.model_dump(mode="json"),
        files=files,
        **_cost(scored),
        **origin(),
    )


def server_notes(scored: Sequence[ScoredResponse], traffic: Traffic) -> list[str]:
    """What a server's replies leave open or tell about the scores."""
    answers = [each.response for each in scored]
    thoughts = [each for each in answers if each.reasoning is not None]
    blank = sum(not each.text.strip() for each in thoughts)
    uncounted = sum(each.prompt_tokens is None for each in answers)
    notes = []
    if thoughts:
        notes.append(f"{len(thoughts)} answers came with a thought of their own; the text behind it is scored")
    if blank:
        notes.append(f"{blank} answers are blank, as the thought used all of --max-new-tokens; they count as wrong")
    if uncounted:
        notes.append(
            f"the server did not say how much of the prompt it read for {uncounted} of {len(answers)} answers; "
            "whether it cut them could not be checked"
        )
    if traffic.retried:
        again = ", ".join(f"{reason} {count}" for reason, count in sorted(traffic.retried.items()))
        notes.append(f"requests sent again: {again}, after {traffic.waited:.1f} s of waiting in all")
    if traffic.other_models:
        notes.append(f"replies name another model than the one asked for: {', '.join(sorted(traffic.other_models))}")
    return notes


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
    return "\n".join([*lines, *skipped, *(f"note: {note}" for note in results.notes), cost])


def _shown(cell: ScoreCell | None) -> str:
    if cell is None:
        return "-"
    low, mean, high = (f"{100 * value:.1f}" for value in (cell.low, cell.score, cell.high))
    return f"{mean} [{low}, {high}] n={cell.n}"
