"""What an evaluation found, as its JSON file holds it: `<run_dir>/evaluation/<name>.json` where a run is evaluated.

Whoever compares runs reads this schema; it needs no torch. Beside the JSON lie, with the same stem, the scored
predictions (`<name>.predictions.jsonl`) and the pictures (`<name>.*.png`).
"""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_solopo.errors import UserError, first_problem
from megatron_solopo.files import write_json

EVALUATION_FOLDER = "evaluation"

Backend = Literal["megatron", "transformers", "server"]
Interval = Literal["wilson", "bootstrap"]


class ResultsPart(BaseModel):
    """A part of a file of results."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Results(ResultsPart):
    """A whole file of results."""

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all."""
        write_json(path, self.model_dump(mode="json"))


AnyResults = TypeVar("AnyResults", bound=Results)


def read_results(path: Path, kind: type[AnyResults], command: str) -> AnyResults:
    """Read a file that `command` writes. Raises UserError naming it and the field that is not of the schema."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = first_problem(error, "the whole file")
        raise UserError(f"{path}: {problem} (expected results of {command})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


class Cell(ResultsPart):
    """The mean score of some samples. Sums are over the cell's samples."""

    task: str
    metric: str
    """A name of `data.scoring`: sub_em, exact_match, token_f1, string_match_part or string_match_all."""
    length: int | None
    """Tokens of the prompt: as asked for, or the upper bound of a bucket of true lengths; null: all lengths."""
    depth: float | None
    """Where the evidence lies, 0 (start) to 1 (end); null: all depths, and tasks that have none."""
    n: int = Field(ge=1)
    """Samples."""
    score: float
    """Mean, in [0, 1]."""
    low: float
    """Lower end of the 95 % confidence interval."""
    high: float
    interval: Interval
    """wilson: Wilson's score interval, for scores of 0 and 1; bootstrap: its percentiles, for means of other scores."""
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    """Wall time of the generation; samples that are generated side by side share it."""


class SkippedSamples(ResultsPart):
    """Samples that were not asked for, counted."""

    task: str
    length: int | None
    n: int
    reason: str


class LongContextResults(Results):
    """The file that `evaluate long-context` writes."""

    kind: Literal["long_context"] = "long_context"
    schema_version: Literal[1] = 1
    name: str
    model: str
    """The directory that was evaluated, or the name that the server knows the model by."""
    backend: Backend
    run_dir: str | None
    """Of the training run that the checkpoint belongs to; null where it belongs to none."""
    step: int | None
    """Optimizer step of the checkpoint; null where it is of no run."""
    main_metrics: dict[str, str]
    """By task, the metric that pictures show."""
    lengths: list[int]
    """Every length of `cells`, ascending."""
    depths: list[float]
    """Every depth of `cells`, ascending; empty where no task has any."""
    cells: list[Cell]
    """For every task and metric: each length, each depth, each of both, and all together (both null)."""
    skipped: list[SkippedSamples]
    max_positions: int | None
    """Positions that the model was made for; null where a server does not say."""
    samples: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    """Wall time of all generation, interrupted sessions included; making the prompts is in it for a server alone."""
    layout: dict[str, int]
    """Parallel sizes by Megatron-Core's names, and `data_parallel_size`; empty but for backend megatron."""
    device: str
    created: str
    version: str
    command: str
    settings: dict[str, Any]
    """What was asked for, by the option's name."""

    def cell(self, task: str, metric: str, *, length: int | None = None, depth: float | None = None) -> Cell | None:
        """The cell at this place, None where there is none."""
        place = (task, metric, length, depth)
        return next((each for each in self.cells if (each.task, each.metric, each.length, each.depth) == place), None)


def read_long_context(path: Path) -> LongContextResults:
    """Read the file, see `read_results`."""
    return read_results(path, LongContextResults, "evaluate long-context")
