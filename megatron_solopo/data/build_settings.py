"""What a user asks of `data build`, and what is illegal about it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_solopo.data.corpus.question import LeakRule
from megatron_solopo.data.corpus.read import Format
from megatron_solopo.data.encode import Template
from megatron_solopo.data.lengths import LengthPlan, parse_lengths

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
        """The long lengths; raises ValueError for an illegal `long_tokens`."""
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
            raise ValueError("\n".join(mistakes))

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
