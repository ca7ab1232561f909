"""The samples that a model is asked, and files of questions as a source of them.

A source lists its samples cheaply as `SampleSpec`. It makes a prompt only when the prompt is asked, since prompts are
long. `QuestionFile` reads what `data build` or `data select` wrote; generated tasks are in `evaluate.tasks`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, Field

from megatron_solopo.config import Context
from megatron_solopo.data.messages import Content
from megatron_solopo.data.rendering import check_arguments, check_template, template_of
from megatron_solopo.data.template_arguments import NO_ARGUMENTS, TemplateArguments
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.statistics import bucket_bound
from megatron_solopo.generate.scoring import Score
from megatron_solopo.triplets.context_rows import ContextFile, RowWithArguments
from megatron_solopo.triplets.prompt import Measure

QA_METRICS: tuple[Score, ...] = ("sub_em", "exact_match", "token_f1", "string_match_part")
"""Scores of a question with one answer, which may have several forms. The first is the main score."""


@dataclass(frozen=True)
class SampleSpec:
    """A sample before its prompt is made.

    Attributes:
        id: Different for every sample, and the same in every run with the same settings.
        task: Name of the task, or of the file and its side.
        length: Tokens of the prompt as asked for, or the upper bound of its bucket.
        depth: Where the evidence lies, from 0 to 1; None where it has no single depth.
        prompt_tokens: True number of tokens of the prompt.
        max_new_tokens: The most tokens of the answer.
        key: Tells the source which sample to make.
    """

    id: str
    task: str
    length: int
    depth: float | None
    prompt_tokens: int
    max_new_tokens: int
    key: int


@dataclass(frozen=True)
class Sample:
    """A sample with its prompt."""

    spec: SampleSpec
    prompt: Content
    answers: tuple[str, ...]
    arguments: TemplateArguments = NO_ARGUMENTS
    """What the chat template gets beside the messages."""


class LengthNotMet(UserError):
    """No prompt of a sample's length can be made.

    Attributes:
        reason: In words that are the same for other samples, to count them by. The message has this sample's numbers.
    """

    def __init__(self, spec: SampleSpec, reason: str, message: str) -> None:
        super().__init__(f"--lengths {spec.length}: {spec.task}: {message}")
        self.reason = reason


class SampleSource(Protocol):
    """Generated tasks, or a file of questions."""

    metrics: dict[str, tuple[Score, ...]]
    """Scores of each task, the main one first."""

    def specs(self) -> list[SampleSpec]:
        """Every sample, without its prompt."""

    def build(self, spec: SampleSpec) -> Sample:
        """One sample with its prompt, the same whenever it is built. Raises LengthNotMet."""


DEFAULT_MAX_NEW_TOKENS = 256


def _not_blank(answer: str) -> str:
    if not answer.strip():
        raise UserError("is blank, and would be found in every response")
    return answer


class QuestionRow(RowWithArguments):
    """The fields of a row that are read.

    Rows with the same `question_id` share a short prompt, which is asked once.
    """

    id: str
    question_id: str | None = None
    prompt_short: Content | None = None
    prompt_long: Content | None = None
    answers: list[Annotated[str, AfterValidator(_not_blank)]] = Field(min_length=1)
    evidence_depths: list[float] = Field(default=[])
    """Depths of the pieces of evidence in the long context, from 0 to 1."""
    response_tokens: int | None = Field(default=None, ge=1)
    """The most tokens of a response."""

    def prompt(self, side: Context) -> Content | None:
        """The prompt of one side; None where the row has none."""
        return self.prompt_short if side == "short" else self.prompt_long


class QuestionFile:
    """The samples of a file, see `SampleSource`; one task per side, `<stem>.short` and `<stem>.long`.

    The depth of a long sample is the mean depth of its evidence, moved to the nearest of `depths`. A short sample has
    no depth.

    Args:
        path: Rows of `QuestionRow`.
        sides: Which prompts to ask.
        tokenizer: The model's.
        buckets: Upper bounds of the buckets of prompt lengths. Longer prompts get buckets that end at powers of two.
        depths: Legal depths of samples.
        max_new_tokens: Replaces the rows' `response_tokens`, and `DEFAULT_MAX_NEW_TOKENS` for rows without it.
        limit: Samples per side, the file's first; None: all.
        kwargs: Arguments of the chat template for all rows.

    Raises:
        UserError: A row is no `QuestionRow`, lacks a side that is asked for, or has arguments that nothing reads.
    """

    def __init__(
        self,
        path: Path,
        sides: Sequence[Context],
        tokenizer: Tokenizer,
        buckets: Sequence[int],
        depths: Sequence[float],
        max_new_tokens: int | None = None,
        limit: int | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._path = path
        self._file = ContextFile(path)
        self._tokenizer = tokenizer
        self._buckets = sorted(buckets)
        self._depths = depths
        self._max_new_tokens = max_new_tokens
        self._kwargs = kwargs or {}
        self.metrics = {f"{path.stem}.{side}": QA_METRICS for side in sides}
        self._specs = [spec for side in sides for spec in self._side_specs(side, limit)]

    def specs(self) -> list[SampleSpec]:
        """Every sample, ordered by the length of its prompt so that equally long ones can share a batch."""
        return sorted(self._specs, key=lambda spec: (spec.task, spec.prompt_tokens))

    def build(self, spec: SampleSpec) -> Sample:
        """Read the row again, as prompts are not held."""
        row = self._file.row_at(spec.key, QuestionRow)
        prompt = row.prompt("short" if spec.task.endswith(".short") else "long")
        assert prompt is not None
        return Sample(spec, prompt, tuple(row.answers), row.arguments(self._kwargs))

    def _side_specs(self, side: Context, limit: int | None) -> Iterator[SampleSpec]:
        asked: set[str] = set()
        for number, offset, row in self._file.rows(QuestionRow):
            if limit is not None and len(asked) >= limit:
                return
            prompt = row.prompt(side)
            if prompt is None:
                raise UserError(f"{self._path}:{number}: prompt_{side}: is missing; see --side")
            name = (row.question_id or row.id) if side == "short" else row.id
            if name in asked:
                if side == "long":
                    raise UserError(f"{self._path}:{number}: id: {name!r} is already the id of an earlier row")
                continue
            asked.add(name)
            tokens = self._count(prompt, row.arguments(self._kwargs), f"{self._path}:{number}")
            max_new_tokens = self._max_new_tokens or row.response_tokens or DEFAULT_MAX_NEW_TOKENS
            depth = self._depth(row.evidence_depths) if side == "long" else None
            task = f"{self._path.stem}.{side}"
            yield SampleSpec(f"{task}:{name}", task, self._bucket(tokens), depth, tokens, max_new_tokens, offset)

    def _count(self, prompt: Content, arguments: TemplateArguments, where: str) -> int:
        template = template_of(prompt)
        if template == "chat":
            check_template(template, self._tokenizer, "the model's tokenizer")
        check_arguments(template, self._tokenizer, arguments, where)
        return Measure(self._tokenizer, template, arguments).prompt(prompt)

    def _bucket(self, tokens: int) -> int:
        longer = [bound for bound in self._buckets if bound >= tokens]
        return longer[0] if longer else bucket_bound(tokens)

    def _depth(self, evidence: Sequence[float]) -> float | None:
        if not evidence or not self._depths:
            return None
        mean = sum(evidence) / len(evidence)
        return min(self._depths, key=lambda depth: abs(depth - mean))
