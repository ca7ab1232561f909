"""Every generated task by its name, and the samples that a user asks for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_solopo.data.messages import Content
from megatron_solopo.data.settings import Template
from megatron_solopo.data.template_arguments import NO_ARGUMENTS, TemplateArguments
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.samples import QA_METRICS, LengthNotMet, Sample, SampleSpec
from megatron_solopo.evaluate.tasks.prompt_length import UnsizedSample, fit_length
from megatron_solopo.evaluate.tasks.question_corpus import QuestionCorpus
from megatron_solopo.evaluate.tasks.synthetic_samples import (
    NEEDLES,
    common_words_sample,
    needle_sample,
    variable_tracking_sample,
)
from megatron_solopo.evaluation_settings import QA
from megatron_solopo.generate.scoring import Score
from megatron_solopo.triplets.prompt import Measure
from megatron_solopo.triplets.seeds import generator

_TRACKING, _WORDS = "variable_tracking", "common_words"
_RULER_METRICS: tuple[Score, ...] = ("string_match_all",)


@dataclass(frozen=True)
class TaskKind:
    """What a task fixes: its scores, the main one first, and the most tokens of an answer."""

    metrics: tuple[Score, ...]
    max_new_tokens: int


TASKS = {
    **dict.fromkeys(NEEDLES, TaskKind(_RULER_METRICS, 64)),
    _TRACKING: TaskKind(_RULER_METRICS, 64),
    _WORDS: TaskKind(_RULER_METRICS, 128),
    QA: TaskKind(QA_METRICS, 256),
}
"""RULER allows 128 tokens for needles, 30 for variable tracking, 120 for common words and 32 for QA. Ours differ: our
codes are short, a small vocabulary needs more tokens for names and words, and a model may reason before it answers."""
_NO_PADDING = "no padding meets this length"
_TRIED = 32


@dataclass(frozen=True)
class TaskSettings:
    """Which samples are made.

    Attributes:
        tasks: Names of `TASKS`.
        lengths: Tokens of the prompts, chat template included.
        depths: Where the evidence lies, for tasks with a single piece of it. The samples take the depths in turn.
        samples: Per task and length.
        seed: A sample depends on the seed, the task's name, the sample's number and its length alone.
        max_new_tokens: The most tokens of an answer; None takes each task's own number.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int
    max_new_tokens: int | None = None


class GeneratedTasks:
    """Samples of `TASKS`, see `evaluate.samples.SampleSource`.

    Args:
        measure: Counts tokens as `template` says.
        template: plain prompts are text that ends with the beginning of an answer; chat prompts are one user message.
        sentences: Of the text that hides the facts; None makes sentences up.
        corpus: For the task `qa`.
        arguments: What the chat template gets beside the messages, as `measure` has it.
    """

    def __init__(
        self,
        settings: TaskSettings,
        measure: Measure,
        template: Template,
        sentences: Sequence[str] | None = None,
        corpus: QuestionCorpus | None = None,
        arguments: TemplateArguments = NO_ARGUMENTS,
    ) -> None:
        self._settings = settings
        self._measure = measure
        self._template = template
        self._sentences = sentences
        self._corpus = corpus
        self._arguments = arguments
        self.metrics = {name: TASKS[name].metrics for name in settings.tasks}
        if QA in settings.tasks:
            if corpus is None:
                raise UserError("--tasks qa: needs --corpus")
            if settings.samples > len(corpus):
                raise UserError(f"--samples {settings.samples}: --corpus holds only {len(corpus)} questions to answer")

    def specs(self) -> list[SampleSpec]:
        """Every sample, without its prompt."""
        return [
            self._spec(task, length, number)
            for task in self._settings.tasks
            for length in self._settings.lengths
            for number in range(self._settings.samples)
        ]

    def check(self) -> None:
        """Raise UserError if the first sample of a task and length cannot be made."""
        for spec in self.specs():
            if spec.key == 0:
                try:
                    self.build(spec)
                except LengthNotMet as error:
                    raise UserError(f"{error}{self._advice(spec, error)}") from None

    def _advice(self, spec: SampleSpec, error: LengthNotMet) -> str:
        """Name the next length that can be met, if only the padding fails."""
        for length in range(spec.length + 1, spec.length + _TRIED) if error.reason == _NO_PADDING else ():
            try:
                self.build(replace(spec, length=length, prompt_tokens=length))
            except LengthNotMet:
                continue
            return f"; the next that can be met is {length}"
        return ""

    def build(self, spec: SampleSpec) -> Sample:
        """One sample with its prompt. Raises LengthNotMet where no prompt of the length can be made."""
        unsized = self._unsized(spec)

        def prompt(units: int, padding: str) -> Content:
            return self._content(unsized.build(units, padding), unsized.lead)

        def excess(content: Content) -> int:
            return self._measure.prompt(content) - spec.length

        content = fit_length(prompt, excess, unsized.most_units)
        if content is None:
            bounds = [0] if unsized.most_units is None else [0, unsized.most_units]
            least, *most = (self._measure.prompt(prompt(units, "")) for units in bounds)
            if least > spec.length:
                raise LengthNotMet(spec, "takes more tokens", f"takes at least {least} tokens")
            if most and most[0] <= spec.length:
                few = "--corpus holds too few documents"
                raise LengthNotMet(spec, few, f"{few}, for {most[0]} tokens")
            raise LengthNotMet(spec, _NO_PADDING, _NO_PADDING)
        return Sample(spec, content, unsized.answers, self._arguments)

    def _spec(self, task: str, length: int, number: int) -> SampleSpec:
        depth = self._settings.depths[number % len(self._settings.depths)] if self._has_depth(task) else None
        max_new_tokens = self._settings.max_new_tokens or TASKS[task].max_new_tokens
        return SampleSpec(f"{task}:{length}:{depth}:{number}", task, length, depth, length, max_new_tokens, number)

    def _has_depth(self, task: str) -> bool:
        if task == QA:
            return self._corpus is not None and self._corpus.has_one_piece_of_evidence
        return task in NEEDLES and NEEDLES[task].values == NEEDLES[task].asked == 1

    def _unsized(self, spec: SampleSpec) -> UnsizedSample:
        rng = generator(self._settings.seed, f"{spec.task}:{spec.key}")
        if spec.task in NEEDLES:
            return needle_sample(NEEDLES[spec.task], spec.depth, rng, self._sentences)
        if spec.task == _TRACKING:
            return variable_tracking_sample(rng, self._sentences)
        if spec.task == _WORDS:
            return common_words_sample(spec.length, rng)
        assert self._corpus is not None
        return self._corpus.sample(spec.key, spec.depth, rng)

    def _content(self, text: str, lead: str) -> Content:
        if self._template == "chat":
            return [{"role": "user", "content": text}]
        return f"{text}\n\n{lead}" if lead else text
