"""Every task by its name, and the samples that a user asks of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_solopo.data.rows import Content
from megatron_solopo.data.settings import Template
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.samples import QA_METRICS, Sample, Spec, Unfit
from megatron_solopo.evaluate.tasks.fit import Draft, fit
from megatron_solopo.evaluate.tasks.questions import QuestionCorpus
from megatron_solopo.evaluate.tasks.synthetic import NEEDLES, needle_draft, tracking_draft, words_draft
from megatron_solopo.generate.scoring import Score
from megatron_solopo.triplets.prompt import Measure
from megatron_solopo.triplets.seeds import generator

QA, _TRACKING, _WORDS = "qa", "variable_tracking", "common_words"
_RULER_METRICS: tuple[Score, ...] = ("string_match_all",)


@dataclass(frozen=True)
class Task:
    """What is fixed of a task: its scores, the main one first, and the tokens that its answers may take."""

    metrics: tuple[Score, ...]
    max_new_tokens: int


TASKS = {
    **dict.fromkeys(NEEDLES, Task(_RULER_METRICS, 64)),
    _TRACKING: Task(_RULER_METRICS, 64),
    _WORDS: Task(_RULER_METRICS, 128),
    QA: Task(QA_METRICS, 256),
}
"""Room for answers. RULER gives needles 128, variable tracking 30, common words 120 and QA 32. Ours differs: our codes
are short (64), small vocabularies take more tokens for names and words (64, 128), and QA may reason first (256)."""
_NO_PADDING = "no padding meets this length"
_TRIED = 32


@dataclass(frozen=True)
class TaskPlan:
    """What is asked for.

    Attributes:
        tasks: Names of `TASKS`.
        lengths: Tokens of the prompts, chat template included.
        depths: Of the evidence, in tasks that have a single one; its samples take them in turn.
        samples: Per task and length.
        seed: With a task's name and a sample's number, decides all of the sample but its length.
        max_new_tokens: Instead of the tasks' own.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int
    max_new_tokens: int | None = None


class GeneratedTasks:
    """Samples of `TASKS`, see `samples.Source`.

    Args:
        plan: What is asked for.
        measure: Counts tokens as `template` says.
        template: Prompts as text that an answer's beginning ends, or as one user message.
        sentences: Of the haystack; None: made up.
        corpus: Of the task `qa`.
    """

    def __init__(
        self,
        plan: TaskPlan,
        measure: Measure,
        template: Template,
        sentences: Sequence[str] | None = None,
        corpus: QuestionCorpus | None = None,
    ) -> None:
        self._plan = plan
        self._measure = measure
        self._template = template
        self._sentences = sentences
        self._corpus = corpus
        self.metrics = {name: TASKS[name].metrics for name in plan.tasks}
        if QA in plan.tasks:
            if corpus is None:
                raise UserError("--tasks qa: needs --corpus")
            if plan.samples > len(corpus):
                raise UserError(f"--samples {plan.samples}: --corpus holds only {len(corpus)} questions to answer")

    def plan(self) -> list[Spec]:
        """Every sample; the depths of a task are spread evenly over its samples."""
        return [
            self._spec(task, length, number)
            for task in self._plan.tasks
            for length in self._plan.lengths
            for number in range(self._plan.samples)
        ]

    def check(self) -> None:
        """Raise ValueError for a task and length of which the first sample cannot be made."""
        for spec in self.plan():
            if spec.key == 0:
                try:
                    self.build(spec)
                except Unfit as error:
                    raise UserError(f"{error}{self._advice(spec, error)}") from None

    def _advice(self, spec: Spec, error: Unfit) -> str:
        """The next length that can be met, where padding is to blame."""
        for length in range(spec.length + 1, spec.length + _TRIED) if error.reason == _NO_PADDING else ():
            try:
                self.build(replace(spec, length=length, prompt_tokens=length))
            except Unfit:
                continue
            return f"; the next that can be met is {length}"
        return ""

    def build(self, spec: Spec) -> Sample:
        """Raises Unfit where no prompt of the length can be made."""
        draft = self._draft(spec)

        def prompt(units: int, padding: str) -> Content:
            return self._content(draft.build(units, padding), draft.lead)

        def excess(content: Content) -> int:
            return self._measure.prompt(content) - spec.length

        content = fit(prompt, excess, draft.most_units)
        if content is None:
            bounds = [0] if draft.most_units is None else [0, draft.most_units]
            least, *most = (self._measure.prompt(prompt(units, "")) for units in bounds)
            if least > spec.length:
                raise Unfit(spec, "takes more tokens", f"takes at least {least} tokens")
            if most and most[0] <= spec.length:
                few = "--corpus holds too few documents"
                raise Unfit(spec, few, f"{few}, for {most[0]} tokens")
            raise Unfit(spec, _NO_PADDING, _NO_PADDING)
        return Sample(spec, content, draft.answers)

    def _spec(self, task: str, length: int, number: int) -> Spec:
        depth = self._plan.depths[number % len(self._plan.depths)] if self._has_depth(task) else None
        room = self._plan.max_new_tokens or TASKS[task].max_new_tokens
        return Spec(f"{task}:{length}:{depth}:{number}", task, length, depth, length, room, number)

    def _has_depth(self, task: str) -> bool:
        if task == QA:
            return self._corpus is not None and self._corpus.has_one_piece_of_evidence
        return task in NEEDLES and NEEDLES[task].values == NEEDLES[task].asked == 1

    def _draft(self, spec: Spec) -> Draft:
        rng = generator(self._plan.seed, f"{spec.task}:{spec.key}")
        if spec.task in NEEDLES:
            return needle_draft(NEEDLES[spec.task], spec.depth, rng, self._sentences)
        if spec.task == _TRACKING:
            return tracking_draft(rng, self._sentences)
        if spec.task == _WORDS:
            return words_draft(spec.length, rng)
        assert self._corpus is not None
        return self._corpus.draft(spec.key, spec.depth, rng)

    def _content(self, text: str, lead: str) -> Content:
        if self._template == "chat":
            return [{"role": "user", "content": text}]
        return f"{text}\n\n{lead}" if lead else text
