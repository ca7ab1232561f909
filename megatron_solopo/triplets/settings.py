"""How long the long contexts are to be: a list, a weighted choice, or a range to draw from.

8192                        every question once, at this length
4096,8192,131072            every question once at each length
8192:0.7,131072:0.3         every question once, at a length drawn with these weights
uniform:4096-131072         every question once, at a length drawn from the range
loguniform:4096-131072      the same, every doubling of the length as likely as the next

What a user asks of `data build`, and what is illegal about it.

What a user asks of `data sample`, and what is illegal about it.

What a user asks of `data select`, and what is illegal about it.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_solopo.data.encode import Template
from megatron_solopo.errors import UserError
from megatron_solopo.generate.scoring import Score
from megatron_solopo.triplets.corpus.formats import LeakRule
from megatron_solopo.triplets.corpus.read import Format

_LEGAL = "8192 | 4096,8192 | 8192:0.7,131072:0.3 | uniform:4096-131072 | loguniform:4096-131072"
_RANGE = re.compile(r"(uniform|loguniform):(\d+)-(\d+)")


@dataclass(frozen=True)
class LengthPlan:
    """Lengths in tokens. Either all of `each`, or one that is drawn."""

    each: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    """Of `each`, to draw one of them; empty to take all."""
    span: tuple[int, int] | None = None
    logarithmic: bool = False

    @property
    def rows(self) -> int:
        """Rows that one question makes."""
        return len(self.each) if self.each and not self.weights else 1

    @property
    def largest(self) -> int:
        """The longest context that can occur."""
        return self.span[1] if self.span else max(self.each)

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """The lengths of one question's rows."""
        if self.weights:
            return (int(rng.choice(self.each, p=np.array(self.weights) / sum(self.weights))),)
        if self.span is None:
            return self.each
        low, high = self.span
        if self.logarithmic:
            return (round(float(np.exp(rng.uniform(np.log(low), np.log(high))))),)
        return (int(rng.integers(low, high + 1)),)


def parse_lengths(text: str) -> LengthPlan:
    """Read `--long-tokens`, see the module. Raises UserError with the legal forms."""
    try:
        return _parse(text.replace("_", "").replace(" ", ""))
    except ValueError as error:
        raise UserError(f"--long-tokens {text}: {error}; legal: {_LEGAL}") from None


def _parse(text: str) -> LengthPlan:
    if found := _RANGE.fullmatch(text):
        span = int(found[2]), int(found[3])
        if not 0 < span[0] < span[1]:
            raise UserError("a range begins at 1 or later and ends behind its beginning")
        return LengthPlan(span=span, logarithmic=found[1] == "loguniform")
    parts = [part.split(":") for part in text.split(",")]
    if not all(part[0].isdecimal() and int(part[0]) > 0 for part in parts):
        raise UserError("a length is a whole number of tokens, at least 1")
    each = tuple(int(part[0]) for part in parts)
    if len(set(each)) != len(each):
        raise UserError("a length is given twice")
    if {len(part) for part in parts} == {1}:
        return LengthPlan(each)
    if {len(part) for part in parts} != {2}:
        raise UserError("either every length has a weight or none")
    try:
        weights = tuple(float(part[1]) for part in parts)
    except ValueError:
        raise UserError("a weight is a number") from None
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError("a weight is a finite number above 0")
    return LengthPlan(each, weights)


DEFAULT_SHORT_DISTRACTORS = 3


@dataclass(frozen=True)
class BuildSettings:
    """Everything that decides a build, and where it goes.

    Attributes:
        input: The corpus.
        output: JSONL to write.
        tokenizer: Directory or file of the tokenizer that lengths are measured with.
        format: Of the corpus.
        pool: Documents that distractors are drawn from beside the corpus's own, JSONL of {"title", "text"}.
        template: Prompts as strings, or as chat messages.
        prompt_template: Jinja file; None is the built-in one.
        titles: Whether documents show their titles.
        short_distractors: Documents beside the evidence in the short context; None is 3, or by `short_tokens`.
        short_tokens: Length of the short context with the response, instead of a number of distractors.
        long_tokens: Length of the long context with the response, see `data.lengths`.
        responses: sampled leaves room for responses to come, constructed writes MuSiQue's by rule.
        response_tokens: Room for the longest response, its end token included, where they are sampled.
        leak_rule: What excludes a distractor.
        document_order: random, or documents as in the corpus (the evidence scattered all the same).
        underfull: What becomes of a row for whose length the pool does not suffice.
        bad_rows: Whether rows that are not of the format are an error, or left out and reported.
        seed: With a question's id, the source of all that is random.
        num_proc: Processes; the result does not depend on it.
        overwrite: Replace an existing output.
    """

    input: Path
    output: Path
    tokenizer: str
    format: Format = "musique"
    pool: Path | None = None
    template: Template = "plain"
    prompt_template: Path | None = None
    titles: bool = True
    short_distractors: int | None = None
    short_tokens: int | None = None
    long_tokens: str = "8192"
    responses: Literal["sampled", "constructed"] = "sampled"
    response_tokens: int | None = None
    leak_rule: LeakRule = "substring"
    document_order: Literal["random", "corpus"] = "random"
    underfull: Literal["drop", "keep"] = "drop"
    bad_rows: Literal["refuse", "drop"] = "refuse"
    seed: int = 0
    num_proc: int = 1
    overwrite: bool = False

    @property
    def plan(self) -> LengthPlan:
        """The long lengths; raises UserError for an illegal `long_tokens`."""
        return parse_lengths(self.long_tokens)

    @property
    def room(self) -> int:
        """Tokens kept free for a sampled response."""
        return 512 if self.response_tokens is None else self.response_tokens

    @property
    def wanted_distractors(self) -> int:
        """Documents beside the evidence in the short context, where a number decides."""
        return DEFAULT_SHORT_DISTRACTORS if self.short_distractors is None else self.short_distractors

    @property
    def inputs(self) -> list[Path]:
        """Every file that is read."""
        return [path for path in (self.input, self.pool, self.prompt_template) if path is not None]

    def to_json(self) -> dict[str, Any]:
        """All settings by name."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def check(self) -> None:
        """Raise ValueError with one line per mistake."""
        minima = {
            "--short-distractors": (self.short_distractors, 0),
            "--short-tokens": (self.short_tokens, 1),
            "--response-tokens": (self.response_tokens, 1),
            "--seed": (self.seed, 0),
            "--num-proc": (self.num_proc, 1),
        }
        mistakes = [
            f"{flag} {value}: must be at least {minimum}"
            for flag, (value, minimum) in minima.items()
            if value is not None and value < minimum
        ]
        mistakes += self._contradictions()
        try:
            if self.plan.largest <= (self.short_tokens or 0):
                mistakes.append(f"--short-tokens {self.short_tokens}: must be below --long-tokens {self.long_tokens}")
        except ValueError as error:
            mistakes.append(str(error))
        mistakes += [f"{path}: no such file" for path in self.inputs if not path.is_file()]
        if mistakes:
            raise UserError("\n".join(mistakes))

    def _contradictions(self) -> list[str]:
        found = []
        if self.short_tokens is not None and self.short_distractors is not None:
            found.append("--short-tokens and --short-distractors: give one of them")
        if self.responses == "constructed":
            if self.format != "musique":
                found.append(f"--responses constructed: needs the hops of --format musique, not {self.format}")
            if self.response_tokens is not None:
                found.append("--response-tokens: is measured, not reserved, with --responses constructed; leave it out")
            if self.short_tokens is not None:
                found.append(
                    "--short-tokens: not with --responses constructed, whose wrong answers are drawn from the short "
                    "context; use --short-distractors"
                )
        return found


END_TOKENS = 8
"""Tokens of the room for a response that are left to the template's end of a message."""


@dataclass(frozen=True)
class SampleSettings:
    """What a user asks of `data sample`.

    Attributes:
        contexts: Output of `data build`.
        output: The journal, JSONL.
        model: A Hugging Face directory; or, with `server`, the name that the server knows the model by.
        server: Base URL, such as http://localhost:8000/v1; None to run the model here.
        num_samples: Responses per question.
        temperature: Above 0.
        top_p: In (0, 1].
        max_tokens: Of a response; None is the contexts' room less `END_TOKENS`.
        samples_per_request: Responses that are asked for at once.
        concurrency: Requests under way at once.
        timeout: Seconds that a request may take.
        retries: How often a request that fails is sent again.
        backoff: Seconds before the first retry; doubled for each further one, up to a minute.
        api_key_env: Environment variable that holds the server's key; None sends none.
        seed: Every request's seed is derived from it.
    """

    contexts: Path
    output: Path
    model: str
    server: str | None = None
    num_samples: int = 32
    temperature: float = 0.85
    top_p: float = 1.0
    max_tokens: int | None = None
    samples_per_request: int = 8
    concurrency: int = 32
    timeout: float = 600.0
    retries: int = 8
    backoff: float = 1.0
    api_key_env: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError with one line per mistake."""
        least = {"--num-samples": self.num_samples, "--samples-per-request": self.samples_per_request}
        least |= {"--concurrency": self.concurrency, "--max-tokens": 1 if self.max_tokens is None else self.max_tokens}
        mistakes = [f"{flag} {value}: must be at least 1" for flag, value in least.items() if value < 1]
        above_zero = {"--temperature": self.temperature, "--timeout": self.timeout, "--backoff": self.backoff}
        mistakes += [f"{flag} {value}: must be above 0" for flag, value in above_zero.items() if not value > 0]
        if not 0 < self.top_p <= 1:
            mistakes.append(f"--top-p {self.top_p}: must be above 0 and at most 1")
        mistakes += [
            f"{f} {v}: must not be negative" for f, v in (("--retries", self.retries), ("--seed", self.seed)) if v < 0
        ]
        if self.server is not None and not self.server.startswith(("http://", "https://")):
            mistakes.append(f"--server {self.server}: must begin with http:// or https://")
        if mistakes:
            raise UserError("\n".join(mistakes))


ChosenPolicy = Literal["shortest", "random", "highest_f1"]
RejectedPolicy = Literal["random", "highest_f1", "nearest_length"]


@dataclass(frozen=True)
class SelectSettings:
    """Everything that decides a selection, and where it goes.

    Attributes:
        contexts: Output of `data build`.
        responses: Output of `data sample`, or JSONL of {"question_id", "index", "text"}.
        output: Triplets to write, JSONL.
        tokenizer: Directory or file of the tokenizer that responses are measured with.
        score: What makes a response right, see `data.scoring`.
        threshold: Least score of a right response.
        scored_text: final is what stands behind `answer_marker`, where the response has it; whole is all of it.
        answer_marker: Text before the final answer, ignoring case; the last one in a response counts.
        chosen: Which of the right responses: the shortest, any, or the one whose answer has most words of a gold one.
        rejected: Which of the wrong ones: any, the nearest miss by words, or the one nearest in length.
        max_pairs_per_question: Pairs per question, each response in one pair at most.
        min_length_ratio: Least tokens of chosen over rejected.
        max_length_ratio: Most tokens of chosen over rejected.
        seed: With a question's id, decides draws and ties.
        overwrite: Replace an existing output.
    """

    contexts: Path
    responses: Path
    output: Path
    tokenizer: str
    score: Score = "sub_em"
    threshold: float = 1.0
    scored_text: Literal["final", "whole"] = "final"
    answer_marker: str = "answer is:"
    chosen: ChosenPolicy = "shortest"
    rejected: RejectedPolicy = "random"
    max_pairs_per_question: int = 1
    min_length_ratio: float | None = None
    max_length_ratio: float | None = None
    seed: int = 0
    overwrite: bool = False

    def check(self) -> None:
        """Raise ValueError with one line per mistake."""
        mistakes = []
        if not 0 < self.threshold <= 1:
            mistakes.append(f"--threshold {self.threshold}: must be above 0 and at most 1")
        if self.max_pairs_per_question < 1:
            mistakes.append(f"--max-pairs-per-question {self.max_pairs_per_question}: must be at least 1")
        if not self.answer_marker.strip():
            mistakes.append("--answer-marker: must not be blank; to score whole responses, pass --scored-text whole")
        ratios = (("--min-length-ratio", self.min_length_ratio), ("--max-length-ratio", self.max_length_ratio))
        mistakes += [
            f"{flag} {value}: must be above 0" for flag, value in ratios if value is not None and not value > 0
        ]
        if not (self.min_length_ratio or 0) <= (self.max_length_ratio or float("inf")):
            mistakes.append("--min-length-ratio: must not be above --max-length-ratio")
        if self.seed < 0:
            mistakes.append(f"--seed {self.seed}: must not be negative")
        if mistakes:
            raise UserError("\n".join(mistakes))
