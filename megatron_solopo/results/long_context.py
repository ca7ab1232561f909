"""The JSON file of `evaluate long-context`.

Beside it lie, with the same stem, the scored answers (`<name>.predictions.jsonl`) and the pictures (`<name>.*.png`).
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_solopo.results.results_file import Results, ResultsPart, read_results

Backend = Literal["megatron", "transformers", "server"]
Interval = Literal["wilson", "bootstrap"]


class ScoreCell(ResultsPart):
    """The mean of one score over some samples: one cell of the table of tasks, lengths and depths."""

    task: str
    metric: str
    """A name of `generate.scoring`: sub_em, exact_match, token_f1, string_match_part or string_match_all."""
    length: int | None
    """Tokens of the prompt as asked for, or the upper bound of a bucket of true lengths; null: all lengths."""
    depth: float | None
    """Where the evidence lies, 0 (start) to 1 (end); null: all depths, and tasks that have none."""
    n: int = Field(ge=1)
    """Number of samples; the sums below are over them."""
    score: float
    """Mean, in [0, 1]."""
    low: float
    """Lower end of the 95 % confidence interval."""
    high: float
    interval: Interval
    """wilson: Wilson's score interval, for scores of 0 and 1; bootstrap: percentiles, for means of other scores."""
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    """Wall time of the generation; samples that are generated side by side share it."""


class SkippedSamples(ResultsPart):
    """Samples that were not asked or that a server refuses, counted. They are in no mean."""

    task: str
    length: int | None
    n: int
    reason: str


class LongContextResults(Results):
    """The file that `evaluate long-context` writes."""

    kind: Literal["long_context"] = "long_context"
    backend: Backend
    main_metrics: dict[str, str]
    """By task, the metric that pictures show."""
    lengths: list[int]
    """Every length of `cells`, ascending."""
    depths: list[float]
    """Every depth of `cells`, ascending; empty where no task has any."""
    cells: list[ScoreCell]
    """For every task and metric: each length, each depth, each of both, and all together (both null)."""
    skipped: list[SkippedSamples]
    max_positions: int | None
    """Positions that the model was made for; null where a server does not say."""
    samples: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    """Wall time of all generation, interrupted sessions included; with a server, making the prompts is in it."""
    device: str
    notes: list[str] = Field(default_factory=list)
    """What a reader of the scores must know about a server's replies, one sentence each."""
    settings: dict[str, Any]
    """What was asked for, by the option's name."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every file that decides what is asked, by its path. Files of older versions state none."""

    def cell(
        self, task: str, metric: str, *, length: int | None = None, depth: float | None = None
    ) -> ScoreCell | None:
        """The cell at this place, None where there is none."""
        place = (task, metric, length, depth)
        return next((each for each in self.cells if (each.task, each.metric, each.length, each.depth) == place), None)


def read_long_context(path: Path) -> LongContextResults:
    """Read the file, see `read_results`."""
    return read_results(path, LongContextResults, "evaluate long-context")
