"""Ask a model for responses to short or to long contexts, many per prompt.

The model is a Hugging Face directory, or it is behind a server with OpenAI's API. Responses go into a journal as they
come. A run that starts again, after a kill or for more samples, asks only for the missing ones.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_solopo.architecture.model_directory import check_huggingface_directory
from megatron_solopo.checksums import directory_fingerprint
from megatron_solopo.config import Context
from megatron_solopo.data.settings import Template
from megatron_solopo.data.template_arguments import KWARGS_FIELD, TemplateArguments
from megatron_solopo.errors import UserError
from megatron_solopo.generate.journal import (
    PROMPTS_FIELD,
    SIDE_FIELD,
    Journal,
    StoredResponse,
    read_offsets,
    read_refusals,
)
from megatron_solopo.generate.model import Answer, Model, Request, Traffic
from megatron_solopo.generate.refusals import Refusals
from megatron_solopo.progress import bar_style
from megatron_solopo.triplets.context_rows import ContextFile, ContextRow, prompts_hash
from megatron_solopo.triplets.report import Bars, Chart, Histogram, check_output, provenance, write_stage_report
from megatron_solopo.triplets.seeds import derived_seed
from megatron_solopo.triplets.settings import END_TOKENS, SampleSettings


@dataclass(frozen=True)
class SampleReport:
    """What a run of `data sample` did, as `report.json` holds it."""

    provenance: dict[str, Any]
    side: Context
    questions: int
    """With `side` long, each row counts as one."""
    responses: int
    """Responses in the journal at the end."""
    received_now: int
    """Responses that this run received."""
    retried: dict[str, int]
    """How often a request was sent again, by reason."""
    waited_seconds: float
    """Waiting before requests were sent again, summed over the requests."""
    finish_reasons: dict[str, int]
    refused: dict[str, int]
    """Responses that the server refuses for ever, by reason."""
    with_thought: int
    """Responses whose thought the server told apart."""
    without_text: int
    """Responses whose thought used up all of their tokens."""
    repeated: int
    """Responses with the same text as another to their prompt."""
    prompts_not_counted: int
    """Responses for which the server did not say how many tokens of the prompt it read."""
    other_models: dict[str, int]
    """Replies in this run that name another model than the one asked for, by this name."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        def listed(counts: dict[str, int]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"

        waited = f", after {self.waited_seconds:.1f} s of waiting in all" if self.retried else ""
        lines = [
            f"{self.side} contexts: {self.questions}",
            f"responses: {self.responses}, {self.received_now} of them now",
            f"requests sent again: {listed(self.retried)}{waited}",
            f"why responses ended: {listed(self.finish_reasons)}",
            f"responses that the server refuses: {listed(self.refused)}",
        ]
        if self.with_thought:
            lines.append(f"responses with a thought of their own: {self.with_thought}")
        if self.without_text:
            lines.append(f"responses without text, as the thought used all of --max-tokens: {self.without_text}")
        if self.repeated:
            lines.append(f"responses with the same text as another to their prompt: {self.repeated}")
        if self.prompts_not_counted:
            lines.append(
                f"responses whose server did not say how much of the prompt it read: {self.prompts_not_counted}; "
                "whether it cut them could not be checked"
            )
        if self.other_models:
            lines.append(f"replies that name another model: {listed(self.other_models)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Missing:
    """Samples to ask for in one request."""

    name: str
    """See `ContextRow.asked_as`."""
    offset: int
    """Place of the first row with this prompt in the file."""
    indices: tuple[int, ...]


def sample(settings: SampleSettings) -> SampleReport:
    """Complete the journal `settings.output`.

    Raises UserError if the journal belongs to other settings, if the model refuses more than the settings allow, if it
    cuts prompts or responses, or if some requests got no answer. What was received stays, and the same command asks for
    the rest.
    """
    check_output(settings.output, True, [settings.contexts])
    contexts = ContextFile(settings.contexts)
    prompts, response_tokens = _index(contexts, settings)
    max_tokens = response_tokens - END_TOKENS if settings.max_tokens is None else settings.max_tokens
    if max_tokens < 1 and settings.max_tokens is None:
        raise UserError(
            f"{settings.contexts}: leaves room for responses of {response_tokens} tokens, but the end of a message may "
            f"take {END_TOKENS} of them; build the contexts with a larger --response-tokens"
        )
    if not 1 <= max_tokens <= response_tokens:
        raise UserError(
            f"--max-tokens {max_tokens}: the contexts leave room for {response_tokens} tokens, see --response-tokens"
        )
    made = provenance([settings.contexts], settings.seed, settings)
    with Journal(
        settings.output, _header(contexts, settings, max_tokens), retry_refused=settings.retry_refused
    ) as journal:
        before = journal.count
        model = _load(settings)
        refusals = Refusals(journal, settings, len(prompts), settings.num_samples)
        missing = list(_missing(settings, prompts, journal))
        _ask(contexts, settings, model, missing, journal, refusals, max_tokens)
        received_now = journal.count - before
    return _report(settings, made, len(prompts), received_now, model.traffic)


def _header(contexts: ContextFile, settings: SampleSettings, max_tokens: int) -> dict[str, Any]:
    """Everything that decides a response; neither how many there are nor which server gives them."""
    names = ("model", SIDE_FIELD, "temperature", "top_p", "seed")
    header = {name: getattr(settings, name) for name in names}
    if settings.server is None and Path(settings.model).is_dir():
        check_huggingface_directory(Path(settings.model), "--model")
        header["weights"] = directory_fingerprint(Path(settings.model))
    if settings.chat_template_kwargs:
        header[KWARGS_FIELD] = settings.chat_template_kwargs
    if settings.dtype != "auto":
        header["dtype"] = settings.dtype
    return header | {"max_tokens": max_tokens, PROMPTS_FIELD: prompts_hash(contexts, settings.side)}


def _index(contexts: ContextFile, settings: SampleSettings) -> tuple[dict[str, int], int]:
    """Byte offset of the first row of each prompt, and the least `response_tokens` in the file.

    Raises UserError if there are arguments for a chat template but a prompt is plain text.
    """
    offsets: dict[str, int] = {}
    least = 0
    for number, offset, row in contexts.rows(ContextRow):
        kwargs, name = settings.chat_template_kwargs, row.asked_as(settings.side)
        if isinstance(row.prompt(settings.side), str) and (names := row.arguments(kwargs).names()):
            raise UserError(
                f"{contexts.path}:{number}: the prompt is plain text, so no chat template reads {', '.join(names)}; "
                "leave it out, or build the contexts with --template chat"
            )
        if settings.side == "long" and name in offsets:
            raise UserError(f"{contexts.path}:{number}: id: {name!r} is already the id of another row")
        offsets.setdefault(name, offset)
        least = min(least or row.response_tokens, row.response_tokens)
    return offsets, least


def _load(settings: SampleSettings) -> Model:
    if settings.server is not None:
        from megatron_solopo.generate.server import OpenAIServer

        # Another model than the one to be trained may answer.
        return OpenAIServer(
            settings, settings.model, own_tokenizer=False, temperature=settings.temperature, top_p=settings.top_p
        )
    import torch

    from megatron_solopo.cpu_features import is_cpu
    from megatron_solopo.data.rendering import check_arguments
    from megatron_solopo.data.template_effects import warn_about_clock
    from megatron_solopo.data.tokenizer import load_tokenizer
    from megatron_solopo.generate.transformers import TransformersModel

    device = torch.device("cpu" if is_cpu() else "cuda")
    tokenizer = load_tokenizer(settings.model)
    arguments = TemplateArguments(settings.chat_template_kwargs)
    template: Template = "plain" if tokenizer.chat_template is None else "chat"
    check_arguments(template, tokenizer, arguments)
    warn_about_clock(template, tokenizer, arguments)
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    return TransformersModel(settings.model, tokenizer, device, settings.dtype, **sampling)


def _missing(settings: SampleSettings, prompts: dict[str, int], journal: Journal) -> Iterator[_Missing]:
    size = settings.samples_per_request
    for name, offset in prompts.items():
        indices = sorted(set(range(settings.num_samples)) - journal.done(name))
        for start in range(0, len(indices), size):
            yield _Missing(name, offset, tuple(indices[start : start + size]))


def _ask(
    contexts: ContextFile,
    settings: SampleSettings,
    model: Model,
    missing: Sequence[_Missing],
    journal: Journal,
    refusals: Refusals,
    max_tokens: int,
) -> None:
    """Ask for the missing samples and keep them as they come."""
    total = sum(len(each.indices) for each in missing)
    with closing(tqdm(total=total, desc="Sampling", **bar_style("responses"))) as bar:

        def build(item: _Missing) -> Request:
            row = contexts.row_at(item.offset, ContextRow)
            seed = derived_seed(settings.seed, f"{item.name}:{item.indices[0]}")
            return Request(
                item.name,
                row.prompt(settings.side),
                item.indices,
                max_tokens,
                seed,
                # A model in this process may have another tokenizer than `data build` had.
                prompt_tokens=None if settings.server is None else row.prompt_tokens(settings.side),
                arguments=row.arguments(settings.chat_template_kwargs),
            )

        def keep(request: Request, answers: Sequence[Answer], seconds: float) -> None:
            journal.append(
                [
                    StoredResponse(
                        question_id=request.question_id,
                        index=index,
                        text=answer.text,
                        finish_reason=answer.finish_reason,
                        seed=request.seed,
                        reasoning=answer.reasoning,
                        prompt_tokens=answer.prompt_tokens,
                    )
                    for index, answer in zip(request.indices, answers, strict=True)
                ]
            )
            bar.update(len(answers))

        model.answer([[item] for item in missing], build, keep, refusals)
    refusals.settle()


def _report(
    settings: SampleSettings, made: dict[str, Any], prompts: int, received_now: int, traffic: Traffic
) -> SampleReport:
    finish: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    texts: set[tuple[str, bytes]] = set()
    lengths = []
    for _, response in read_offsets(settings.output):
        finish[response.finish_reason or "not said"] += 1
        lengths.append(len(response.text))
        counts["thought"] += response.reasoning is not None
        counts["no text"] += response.reasoning is not None and not response.text.strip()
        counts["not counted"] += settings.server is not None and response.prompt_tokens is None
        # Texts are long, and a run has millions of them.
        texts.add((response.question_id, hashlib.sha256(f"{response.reasoning}\0{response.text}".encode()).digest()))
    refused: Counter[str] = Counter()
    for each in read_refusals(settings.output):
        refused[each.refused] += len(each.indices)
    report = SampleReport(
        made,
        settings.side,
        prompts,
        len(lengths),
        received_now,
        dict(traffic.retried),
        traffic.waited,
        dict(finish),
        dict(refused),
        with_thought=counts["thought"],
        without_text=counts["no text"],
        repeated=len(lengths) - len(texts),
        prompts_not_counted=counts["not counted"],
        other_models=dict(traffic.other_models),
    )
    charts: list[Chart] = [
        Histogram("Responses", "characters", lengths),
        Bars("Why responses ended", finish),
        Bars("Responses that the server refuses", refused),
        Bars("Requests sent again", traffic.retried),
    ]
    write_stage_report(settings.output, f"Responses: {settings.output.name}", str(report), report.to_json(), charts)
    return report
