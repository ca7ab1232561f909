"""What a model is asked: one prompt, its answers, and where it belongs in the table.

Files of questions: rows of `data build` or `data select`, of which either side's prompts are asked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from megatron_solopo.data.encode import check_template, template_of
from megatron_solopo.data.rows import Content
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.statistics import bucket_bound
from megatron_solopo.generate.scoring import Score
from megatron_solopo.triplets.contexts import parse_context, read_contexts
from megatron_solopo.triplets.prompt import Measure

QA_METRICS: tuple[Score, ...] = ("sub_em", "exact_match", "token_f1", "string_match_part")
"""Of one answer and its other forms; the first is the main one."""


@dataclass(frozen=True)
class Spec:
    """A sample before its prompt is made.

    Attributes:
        id: Unlike any other's, and the same in every run with the same settings.
        task: Name of the task or file.
        length: Tokens of the prompt as asked for, or the upper bound of its bucket.
        depth: Of the evidence, from 0 to 1; None where it has no single one.
        prompt_tokens: True number of tokens.
        max_new_tokens: Tokens that may be generated.
        key: What its source makes it from.
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

    spec: Spec
    prompt: Content
    answers: tuple[str, ...]


class Unfit(UserError):
    """No prompt of a sample's length can be made.

    Attributes:
        reason: In words that other samples share, by which they are counted; the message has this one's numbers.
    """

    def __init__(self, spec: Spec, reason: str, message: str) -> None:
        super().__init__(f"--lengths {spec.length}: {spec.task}: {message}")
        self.reason = reason


class Source(Protocol):
    """Tasks, or files of questions."""

    metrics: dict[str, tuple[Score, ...]]
    """Of each task, the main one first."""

    def plan(self) -> list[Spec]:
        """Every sample, cheap to list."""

    def build(self, spec: Spec) -> Sample:
        """One sample, the same whenever it is built. Raises Unfit, likewise, where none of its length can be made."""


def check_task_names(sources: Sequence[Source]) -> None:
    """Raise ValueError where two sources have a task of one name."""
    names = [name for source in sources for name in source.metrics]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--contexts: two files have the name {min(twice)}; rename one")


Side = Literal["short", "long"]
DEFAULT_ROOM = 256


def _not_blank(answer: str) -> str:
    if not answer.strip():
        raise UserError("is blank, and would be found in every response")
    return answer


class QuestionRow(BaseModel):
    """What is read of a row; other fields are ignored.

    `question_id` tells rows of one question apart from others: they share a short prompt, which is asked once.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    id: str
    question_id: str | None = None
    prompt_short: Content | None = None
    prompt_long: Content | None = None
    answers: list[Annotated[str, AfterValidator(_not_blank)]] = Field(min_length=1)
    evidence_depths: list[float] = []
    """In the long context."""
    response_tokens: int | None = Field(default=None, ge=1)
    """Room for a response."""

    def prompt(self, side: Side) -> Content | None:
        """Of one side."""
        return self.prompt_short if side == "short" else self.prompt_long


class QuestionFile:
    """Samples of a file, see `samples.Source`; one task per side, `<stem>.short` and `<stem>.long`.

    A long sample's depth is the mean depth of its evidence, brought to the nearest of `depths`; of a short context
    none is known.

    Args:
        path: JSONL of `QuestionRow`.
        sides: Which prompts to ask.
        tokenizer: The model's.
        buckets: Upper bounds of the buckets of prompt lengths, which longer prompts extend by powers of two.
        depths: What depths are brought to.
        max_new_tokens: Instead of the rows' `response_tokens`, or of `DEFAULT_ROOM` where a row has none.
        limit: Samples per side, the file's first; None: all.

    Raises:
        ValueError: A row is none, or lacks a side that is asked for.
    """

    def __init__(
        self,
        path: Path,
        sides: Sequence[Side],
        tokenizer: Tokenizer,
        buckets: Sequence[int],
        depths: Sequence[float],
        max_new_tokens: int | None = None,
        limit: int | None = None,
    ) -> None:
        self._path = path
        self._tokenizer = tokenizer
        self._buckets = sorted(buckets)
        self._depths = depths
        self._max_new_tokens = max_new_tokens
        self.metrics = {f"{path.stem}.{side}": QA_METRICS for side in sides}
        self._specs = [spec for side in sides for spec in self._plan_side(side, limit)]

    def plan(self) -> list[Spec]:
        """Every sample, in the order of their prompts' lengths, so that equal ones share a batch."""
        return sorted(self._specs, key=lambda spec: (spec.task, spec.prompt_tokens))

    def build(self, spec: Spec) -> Sample:
        """Reads the row again: prompts are not held."""
        with self._path.open("rb") as stream:
            stream.seek(spec.key)
            row = parse_context(stream.readline(), str(self._path), QuestionRow)
        prompt = row.prompt("short" if spec.task.endswith(".short") else "long")
        assert prompt is not None
        return Sample(spec, prompt, tuple(row.answers))

    def _plan_side(self, side: Side, limit: int | None) -> Iterator[Spec]:
        asked: set[str] = set()
        for number, offset, row in read_contexts(self._path, QuestionRow):
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
            tokens = self._count(prompt)
            room = self._max_new_tokens or row.response_tokens or DEFAULT_ROOM
            depth = self._depth(row.evidence_depths) if side == "long" else None
            task = f"{self._path.stem}.{side}"
            yield Spec(f"{task}:{name}", task, self._bucket(tokens), depth, tokens, room, offset)

    def _count(self, prompt: Content) -> int:
        template = template_of(prompt)
        if template == "chat":
            check_template(template, self._tokenizer, "the model's tokenizer")
        return Measure(self._tokenizer, template).prompt(prompt)

    def _bucket(self, tokens: int) -> int:
        longer = [bound for bound in self._buckets if bound >= tokens]
        return longer[0] if longer else bucket_bound(tokens)

    def _depth(self, evidence: Sequence[float]) -> float | None:
        if not evidence or not self._depths:
            return None
        mean = sum(evidence) / len(evidence)
        return min(self._depths, key=lambda depth: abs(depth - mean))
