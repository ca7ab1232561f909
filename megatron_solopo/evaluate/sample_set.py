"""The samples of an evaluation: where they come from, which fit the model, and what decides an answer to them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_solopo.checkpoint.fingerprint import sample_weights, weights_fingerprint
from megatron_solopo.config import Context
from megatron_solopo.data.rendering import check_arguments
from megatron_solopo.data.settings import Template
from megatron_solopo.data.template_arguments import KWARGS_FIELD, TemplateArguments
from megatron_solopo.data.template_effects import warn_about_clock
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.samples import LengthNotMet, QuestionFile, SampleSource, SampleSpec
from megatron_solopo.evaluate.target import Target
from megatron_solopo.evaluate.tasks.generated_tasks import GeneratedTasks, TaskSettings
from megatron_solopo.evaluate.tasks.question_corpus import QuestionCorpus
from megatron_solopo.evaluate.tasks.synthetic_samples import read_sentences
from megatron_solopo.evaluation_settings import QA, LongContextSettings
from megatron_solopo.files import sha256_file, sha256_text
from megatron_solopo.generate.model import Request
from megatron_solopo.generate.scoring import Score
from megatron_solopo.generate.transformers import max_positions
from megatron_solopo.results.long_context import SkippedSamples
from megatron_solopo.triplets.prompt import Measure, PromptTemplate, read_template

_DEFAULT_SAMPLES = 20


@dataclass(frozen=True)
class SampleSet:
    """What the model is asked.

    Attributes:
        specs: Samples that fit the model.
        skipped: Samples that do not fit, counted. Samples that cannot be made are not among them: only `build` meets
            those.
        metrics: Scores of each task, the main one first.
        max_positions: Of the model; None where unknown.
        sources: By task.
    """

    specs: list[SampleSpec]
    skipped: list[SkippedSamples]
    metrics: dict[str, tuple[Score, ...]]
    max_positions: int | None
    sources: dict[str, SampleSource]

    def build(self, spec: SampleSpec) -> Request | None:
        """Ask one sample; None, on every rank alike, where no prompt of its length can be made."""
        try:
            sample = self.sources[spec.task].build(spec)
        except LengthNotMet:
            return None
        return Request(
            spec.id,
            sample.prompt,
            (0,),
            spec.max_new_tokens,
            right_answers=sample.answers,
            prompt_tokens=spec.prompt_tokens,
            arguments=sample.arguments,
        )

    def count_unmade(self, specs: Iterable[SampleSpec]) -> list[SkippedSamples]:
        """Those of the samples that cannot be made, counted."""
        found: Counter[tuple[str, int, str]] = Counter()
        for spec in specs:
            try:
                self.sources[spec.task].build(spec)
            except LengthNotMet as error:
                found[spec.task, spec.length, error.reason] += 1
        return [
            SkippedSamples(task=task, length=length, n=n, reason=reason) for (task, length, reason), n in found.items()
        ]

    def count_refused(self, refused: Mapping[str, str]) -> list[SkippedSamples]:
        """The samples that a server refuses, counted. Takes the reason by the sample's id."""
        found = Counter((spec.task, spec.length, refused[spec.id]) for spec in self.specs if spec.id in refused)
        return [
            SkippedSamples(task=task, length=length, n=n, reason=f"refused by the server: {reason}")
            for (task, length, reason), n in found.items()
        ]


def collect_samples(settings: LongContextSettings, target: Target, tokenizer: Tokenizer) -> SampleSet:
    """List the samples. Raises UserError for tasks that are too long for the model, or files that hold no question."""
    positions = _served_positions(settings) if target.path is None else max_positions(target.path)
    warn_about_clock(_template(settings, tokenizer), tokenizer, TemplateArguments(settings.chat_template_kwargs))
    sources: list[SampleSource] = _question_files(settings, tokenizer)
    if settings.tasks:
        tasks = _generated_tasks(settings, tokenizer)
        _refuse_overlong(tasks.specs(), positions)
        tasks.check()
        sources.insert(0, tasks)
    by_task: dict[str, SampleSource] = {}
    for source in sources:
        if twice := by_task.keys() & source.metrics.keys():
            raise UserError(f"--contexts: two files have the name {min(twice)}; rename one")
        by_task |= dict.fromkeys(source.metrics, source)
    specs = [spec for source in sources for spec in source.specs()]
    fitting = [spec for spec in specs if positions is None or _total(spec) <= positions]
    left_out = Counter((spec.task, spec.length) for spec in specs) - Counter((s.task, s.length) for s in fitting)
    reason = f"prompt and room for the answer exceed the model's {positions} positions"
    skipped = [SkippedSamples(task=task, length=length, n=n, reason=reason) for (task, length), n in left_out.items()]
    if not fitting:
        raise UserError(f"--contexts: {reason} in all {len(specs)} samples")
    metrics = {task: source.metrics[task] for task, source in by_task.items()}
    return SampleSet(fitting, skipped, metrics, positions, by_task)


def journal_header(settings: LongContextSettings, target: Target, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that decides an answer, by the option's name; not which samples are asked."""
    files = [settings.corpus, settings.haystack, settings.prompt_template]
    hashes = {str(path): sha256_file(path) for path in (*settings.contexts, *files) if path is not None}
    # Journals of older versions have the sample alone.
    weights = {} if target.path is None else {"weights": weights_fingerprint(target.path)}
    given = {KWARGS_FIELD: settings.chat_template_kwargs} if settings.chat_template_kwargs else {}
    return (
        weights
        | given
        | {
            "model": settings.model if target.path is None else sample_weights(target.path),
            "backend": target.backend,
            "dtype": settings.dtype,
            "tokenizer": tokenizer.fingerprint,
            "template": sha256_text(tokenizer.chat_template or "")
            if _template(settings, tokenizer) == "chat"
            else "plain",
            "seed": settings.seed,
            "max_new_tokens": settings.max_new_tokens,
            "files": hashes,
        }
    )


def _generated_tasks(settings: LongContextSettings, tokenizer: Tokenizer) -> GeneratedTasks:
    template = _template(settings, tokenizer)
    asked = TaskSettings(
        settings.tasks,
        settings.lengths,
        settings.depths,
        settings.samples or _DEFAULT_SAMPLES,
        settings.seed,
        settings.max_new_tokens,
    )
    sentences = None if settings.haystack is None else read_sentences(settings.haystack)
    corpus = None
    if QA in settings.tasks:
        assert settings.corpus is not None
        prompt = PromptTemplate(read_template(settings.prompt_template), titles=True, template=template)
        corpus = QuestionCorpus(settings.corpus, settings.format, prompt, settings.seed)
    arguments = TemplateArguments(settings.chat_template_kwargs)
    check_arguments(template, tokenizer, arguments)
    return GeneratedTasks(asked, Measure(tokenizer, template, arguments), template, sentences, corpus, arguments)


def _question_files(settings: LongContextSettings, tokenizer: Tokenizer) -> list[SampleSource]:
    sides: tuple[Context, ...] = ("short", "long") if settings.side == "both" else (settings.side,)
    return [
        QuestionFile(
            path,
            sides,
            tokenizer,
            settings.lengths,
            settings.depths,
            settings.max_new_tokens,
            settings.samples,
            settings.chat_template_kwargs,
        )
        for path in settings.contexts
    ]


def _template(settings: LongContextSettings, tokenizer: Tokenizer) -> Template:
    if settings.template == "auto":
        return "plain" if tokenizer.chat_template is None else "chat"
    if settings.template == "chat" and tokenizer.chat_template is None:
        raise UserError("--template chat: the tokenizer has no chat template; legal: plain")
    return settings.template


def _refuse_overlong(specs: list[SampleSpec], positions: int | None) -> None:
    for spec in specs:
        if positions is not None and _total(spec) > positions:
            most = positions - spec.max_new_tokens
            raise UserError(
                f"--lengths {spec.length}: with {spec.max_new_tokens} tokens for the answer to {spec.task} it exceeds "
                f"the model's {positions} positions; legal: at most {most}, or a smaller --max-new-tokens"
            )


def _total(spec: SampleSpec) -> int:
    return spec.prompt_tokens + spec.max_new_tokens


def _served_positions(settings: LongContextSettings) -> int | None:
    from megatron_solopo.generate.server import served_positions

    assert settings.server is not None
    return served_positions(settings.server, settings.model, settings.api_key_env)
