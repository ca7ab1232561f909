"""What a user asks of `data build`, `data sample` and `data select`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from megatron_solopo.command_settings import CommandSettings
from megatron_solopo.config import Context
from megatron_solopo.data.settings import Template
from megatron_solopo.data.template_arguments import TemplateKwargs
from megatron_solopo.errors import UserError
from megatron_solopo.generate.scoring import Score
from megatron_solopo.generate.settings import ServerSettings
from megatron_solopo.triplets.corpus.formats import Format, LeakRule

if TYPE_CHECKING:
    import numpy as np

_LEGAL_LENGTHS = "8192 | 4096,8192 | 8192:0.7,131072:0.3 | uniform:4096-131072 | loguniform:4096-131072"
_RANGE = re.compile(r"(uniform|loguniform):(\d+)-(\d+)")
_DEFAULT_SHORT_DISTRACTORS = 3
_DEFAULT_RESPONSE_TOKENS = 512

END_TOKENS = 8
"""Tokens of the room for a response that remain free for the template's end of a message."""


@dataclass(frozen=True)
class LengthPlan:
    """Lengths of the long contexts, in tokens: all of `each`, or one that is drawn."""

    each: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    """Weights of `each` for drawing one of them. Empty: every question takes all lengths."""
    span: tuple[int, int] | None = None
    """A range to draw from, instead of `each`. Both ends are included."""
    logarithmic: bool = False
    """Every doubling of the length is as likely as the next."""

    @property
    def largest(self) -> int:
        """The longest context that can occur."""
        return self.span[1] if self.span else max(self.each)

    def draw(self, rng: "np.random.Generator") -> tuple[int, ...]:
        """The lengths of one question's rows."""
        import numpy as np

        if self.weights:
            return (int(rng.choice(self.each, p=np.array(self.weights) / sum(self.weights))),)
        if self.span is None:
            return self.each
        low, high = self.span
        if self.logarithmic:
            return (round(float(np.exp(rng.uniform(np.log(low), np.log(high))))),)
        return (int(rng.integers(low, high + 1)),)


def parse_lengths(text: str) -> LengthPlan:
    """Read `--long-tokens`.

        8192                        every question once, at this length
        4096,8192,131072            every question once at each length
        8192:0.7,131072:0.3         every question once, at a length drawn with these weights
        uniform:4096-131072         every question once, at a length drawn from the range
        loguniform:4096-131072      the same, every doubling of the length as likely as the next

    Raises UserError with the legal forms.
    """
    try:
        return _parse_lengths(text.replace("_", "").replace(" ", ""))
    except UserError as error:
        raise UserError(f"--long-tokens {text}: {error}; legal: {_LEGAL_LENGTHS}") from None


def _parse_lengths(text: str) -> LengthPlan:
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


class BuildSettings(CommandSettings):
    """What a user asks of `data build`. The same settings always give the same output."""

    input: Path
    """The corpus: JSON lines, a JSON array, parquet or Arrow. Text may be compressed with gzip, bzip2, xz or zstd."""
    output: Path
    """JSONL file to write. Its report goes beside it."""
    tokenizer: str
    """Hugging Face directory or SentencePiece .model file that measures lengths."""
    format: Format = "musique"
    """Format of the corpus. generic is {id, question, answers, documents: [{title, text, supporting}]}."""
    pool: Path | None = None
    """More documents to draw distractors from: rows of {title, text}, in a file like the corpus."""
    template: Template = "plain"
    """plain: prompts are text. chat: prompts are chat messages, measured with the chat template."""
    chat_template_kwargs: TemplateKwargs = Field(default={})
    """Arguments for the chat template, such as '{"enable_thinking": false}'. They are written into the rows, where all
    later commands read them."""
    prompt_template: Path | None = None
    """Jinja file over `documents` (title, text) and `question`."""
    titles: bool = True
    """Show the titles of documents."""
    short_distractors: int | None = Field(default=None, ge=0)
    """Documents beside the evidence in the short context. 3 if neither this nor --short-tokens is given."""
    short_tokens: int | None = Field(default=None, ge=1)
    """Fill the short context to this length instead. The length includes the response."""
    long_tokens: str = "8192"
    """Length of the long context with its response, never exceeded: 8192 | 4096,131072 (a row for each) |
    8192:0.7,131072:0.3 (drawn) | uniform:4096-131072 | loguniform:4096-131072."""
    responses: Literal["sampled", "constructed"] = "sampled"
    """sampled: leave room for the responses of `data sample`. constructed: write MuSiQue's responses by rule, which
    gives triplets at once."""
    response_tokens: int | None = Field(default=None, ge=1)
    """Room for the longest sampled response, its end token included. 512 if not given."""
    leak_rule: LeakRule = "substring"
    """Exclude distractors that contain an answer anywhere (substring), as whole words (word), or never (allow)."""
    document_order: Literal["random", "corpus"] = "random"
    """Order of the documents. In the long context the evidence is scattered either way."""
    underfull: Literal["drop", "keep"] = "drop"
    """What happens to rows that the pool cannot fill to their length. Both are counted."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """Rows that are not of the format are an error (refuse), or left out and listed in the report (drop)."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random choice."""
    num_proc: int = Field(default=1, ge=1)
    """Processes. The output does not depend on their number."""
    overwrite: bool = False
    """Replace an existing output file and its report."""

    @field_validator("input", "pool", "prompt_template")
    @classmethod
    def _check_exists(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file")
        return path

    @field_validator("long_tokens")
    @classmethod
    def _check_lengths(cls, text: str) -> str:
        parse_lengths(text)
        return text

    @property
    def length_plan(self) -> LengthPlan:
        """The lengths of the long contexts."""
        return parse_lengths(self.long_tokens)

    @property
    def reserved_tokens(self) -> int:
        """Tokens that remain free for a sampled response."""
        return _DEFAULT_RESPONSE_TOKENS if self.response_tokens is None else self.response_tokens

    @property
    def num_short_distractors(self) -> int:
        """Documents beside the evidence in the short context, if `short_tokens` is not given."""
        return _DEFAULT_SHORT_DISTRACTORS if self.short_distractors is None else self.short_distractors

    @property
    def inputs(self) -> list[Path]:
        """Every file that is read."""
        return [path for path in (self.input, self.pool, self.prompt_template) if path is not None]

    def contradictions(self) -> Iterator[str]:
        if self.short_tokens is not None and self.short_distractors is not None:
            yield "--short-tokens and --short-distractors: give one of them"
        if self.length_plan.largest <= (self.short_tokens or 0):
            yield f"--short-tokens {self.short_tokens}: must be below --long-tokens {self.long_tokens}"
        if self.responses == "constructed":
            if self.format != "musique":
                yield f"--responses constructed: needs the hops of --format musique, not {self.format}"
            if self.response_tokens is not None:
                yield "--response-tokens: is measured, not reserved, with --responses constructed; leave it out"
            if self.short_tokens is not None:
                yield (
                    "--short-tokens: not with --responses constructed, whose wrong answers are drawn from the short "
                    "context; use --short-distractors"
                )


class SampleSettings(ServerSettings):
    """What a user asks of `data sample`."""

    contexts: Path
    """Output of `data build`."""
    output: Path
    """JSONL of responses. An existing file is continued."""
    model: str
    """Hugging Face directory. With --server, the name of the model on the server."""
    side: Context = "short"
    """Which context the model answers. short: once per question, for all its rows. long: every row by itself."""
    num_samples: int = Field(default=32, ge=1)
    """Responses per prompt."""
    temperature: float = Field(default=0.85, gt=0)
    """Temperature of sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of the probability that sampling draws from."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a response, with its thought. If not given, the room in the contexts less 8."""
    samples_per_request: int = Field(default=8, ge=1)
    """Responses per request. Without --server, the batch size."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model. auto: that of its weights. Not for a server."""
    seed: int = Field(default=0, ge=0)
    """The seed of every request is derived from it."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.server is not None and self.dtype != "auto":
            yield f"--dtype {self.dtype}: has no effect with --server; leave it out"


ChosenPolicy = Literal["shortest", "random", "highest_f1"]
RejectedPolicy = Literal["random", "highest_f1", "nearest_length"]


class SelectSettings(CommandSettings):
    """What a user asks of `data select`. The same settings always give the same output."""

    contexts: Path
    """Output of `data build`."""
    responses: Path
    """Output of `data sample`, or JSONL of {question_id, index, text}."""
    output: Path
    """Triplet JSONL to write. Its report goes beside it."""
    tokenizer: str
    """Hugging Face directory or SentencePiece .model file that measures responses."""
    score: Score = "sub_em"
    """What makes a response right: SQuAD's exact match, SQuAD-normalised substring (sub_em), RULER's two
    (string_match_...), or LongBench's F1."""
    threshold: float = Field(default=1.0, gt=0, le=1)
    """Least score of a right response."""
    scored_text: Literal["final", "whole"] = "final"
    """final: score the text behind the answer marker, if the response has the marker. whole: score all of it."""
    answer_marker: str = "answer is:"
    """Text before the final answer of a response. Case does not matter; the last marker counts."""
    chosen: ChosenPolicy = "shortest"
    """Which right response to choose. highest_f1: the one whose answer shares most words with a gold answer."""
    rejected: RejectedPolicy = "random"
    """Which wrong response to reject. nearest_length: the one nearest in length to the chosen one."""
    max_pairs_per_question: int = Field(default=1, ge=1)
    """Most pairs of one question. No response is in two pairs."""
    min_length_ratio: float | None = Field(default=None, gt=0)
    """Least ratio of the tokens of chosen to the tokens of rejected."""
    max_length_ratio: float | None = Field(default=None, gt=0)
    """Greatest ratio of the tokens of chosen to the tokens of rejected."""
    seed: int = Field(default=0, ge=0)
    """Seed of draws and ties."""
    overwrite: bool = False
    """Replace an existing output file and its report."""

    def contradictions(self) -> Iterator[str]:
        if not self.answer_marker.strip():
            yield "--answer-marker: must not be blank; to score whole responses, pass --scored-text whole"
        if not (self.min_length_ratio or 0) <= (self.max_length_ratio or float("inf")):
            yield "--min-length-ratio: must not be above --max-length-ratio"
