"""Ask a model for responses to short contexts, many per question.

The model is a Hugging Face directory or a server with OpenAI's API. Responses go into a journal as they come; started
again after a kill, or for more samples, only what is missing is asked for.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_solopo.errors import UserError
from megatron_solopo.files import sha256_file
from megatron_solopo.generate.journal import Journal, StoredResponse, read_offsets
from megatron_solopo.generate.model import Model, Request, RequestFailed
from megatron_solopo.progress import bar_style
from megatron_solopo.triplets.contexts import ContextRow, parse_context, read_contexts
from megatron_solopo.triplets.report import Bars, Chart, Histogram, check_output, provenance, write_stage_report
from megatron_solopo.triplets.seeds import derived_seed
from megatron_solopo.triplets.settings import END_TOKENS, SampleSettings

_SHOWN = 3


@dataclass(frozen=True)
class SampleReport:
    """What a run of `data sample` did; `report.json` holds the same."""

    provenance: dict[str, Any]
    questions: int
    responses: int
    """In the journal, at the end."""
    received_now: int
    """By this run."""
    retried: dict[str, int]
    finish_reasons: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        def listed(counts: dict[str, int]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"

        return "\n".join(
            [
                f"questions: {self.questions}",
                f"responses: {self.responses}, {self.received_now} of them now",
                f"requests sent again: {listed(self.retried)}",
                f"why responses ended: {listed(self.finish_reasons)}",
            ]
        )


def sample(settings: SampleSettings) -> SampleReport:
    """Complete the journal `settings.output`.

    Raises:
        ValueError: A setting is illegal, the journal is another's, the model refuses the requests, or some got no
            answer; what was received stays, and the same command asks for the rest.
    """
    check_output(settings.output, True, [settings.contexts])
    questions, room = _index(settings.contexts)
    max_tokens = room - END_TOKENS if settings.max_tokens is None else settings.max_tokens
    if not 1 <= max_tokens <= room:
        raise UserError(f"--max-tokens {max_tokens}: the contexts leave room for {room} tokens, see --response-tokens")
    header = _header(settings, max_tokens)
    made = provenance([settings.contexts], settings.seed, settings.model_dump(mode="json"))
    with Journal(settings.output, header) as journal:
        before = sum(map(len, journal.received.values()))
        model = _load(settings)
        requests = _requests(settings, questions, journal, max_tokens)
        total = settings.num_samples * len(questions)
        missing = total - sum(len(_wanted(settings) & journal.received[each]) for each in questions)
        with closing(tqdm(total=missing, desc="Sampling", **bar_style("responses"))) as bar:
            asyncio.run(_Run(model, journal, bar).finish(requests))
        now = sum(map(len, journal.received.values())) - before
    return _report(settings, made, len(questions), now, model.retried)


def _header(settings: SampleSettings, max_tokens: int) -> dict[str, Any]:
    """All that decides what a response may be; not how many, nor where from."""
    names = ("model", "temperature", "top_p", "seed")
    header = {name: getattr(settings, name) for name in names}
    return header | {"max_tokens": max_tokens, "contexts": sha256_file(settings.contexts)}


def _wanted(settings: SampleSettings) -> set[int]:
    return set(range(settings.num_samples))


def _index(path: Path) -> tuple[dict[str, int], int]:
    """Byte offset of each question's first row, whose short context is that of all its rows; and the least room."""
    offsets: dict[str, int] = {}
    room = 0
    for _, offset, row in read_contexts(path, ContextRow):
        offsets.setdefault(row.question_id, offset)
        room = min(room or row.response_tokens, row.response_tokens)
    return offsets, room


def _load(settings: SampleSettings) -> Model:
    if settings.server is not None:
        from megatron_solopo.generate.server import OpenAIServer

        return OpenAIServer(settings)
    from megatron_solopo.triplets.huggingface_sampler import HuggingFaceSampler

    return HuggingFaceSampler(settings)


def _requests(
    settings: SampleSettings, questions: dict[str, int], journal: Journal, max_tokens: int
) -> Iterator[Request]:
    """What is missing, made as it is asked for: prompts are not held."""
    size = settings.samples_per_request
    with settings.contexts.open("rb") as stream:
        for question, offset in questions.items():
            missing = sorted(_wanted(settings) - journal.received[question])
            if not missing:
                continue
            stream.seek(offset)
            prompt = parse_context(stream.readline(), str(settings.contexts), ContextRow).prompt_short
            for start in range(0, len(missing), size):
                indices = tuple(missing[start : start + size])
                yield Request(
                    question, prompt, indices, max_tokens, derived_seed(settings.seed, f"{question}:{indices[0]}")
                )


class _Run:
    """Requests under way, and what became of them."""

    def __init__(self, model: Model, journal: Journal, bar: Any) -> None:
        self._model = model
        self._journal = journal
        self._bar = bar
        self._failed: list[str] = []
        self._failed_in_a_row = 0

    async def finish(self, requests: Iterator[Request]) -> None:
        """Answer every request; raises UserError for those that got no answer."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._model.concurrency):
                    group.create_task(self._work(requests))
        except BaseExceptionGroup as errors:
            # All tasks share one cause: a server that refuses, a full disk, Ctrl-C.
            raise errors.exceptions[0] from None
        finally:
            await self._model.aclose()
        if self._failed:
            shown = "; ".join(self._failed[:_SHOWN]) + ("; ..." if len(self._failed) > _SHOWN else "")
            raise UserError(
                f"{len(self._failed)} requests got no answer: {shown}; what was received is kept, "
                "the same command asks for the rest"
            )

    async def _work(self, requests: Iterator[Request]) -> None:
        """One of the concurrent lines: takes the next request until there is none, or the server seems gone."""
        for request in requests:
            if self._failed_in_a_row >= self._model.concurrency:
                return
            try:
                await self._complete(request)
                self._failed_in_a_row = 0
            except RequestFailed as error:
                self._failed.append(f"{request.question_id}: {error}")
                self._failed_in_a_row += 1

    async def _complete(self, request: Request) -> None:
        """Every sample of one request; a server may give fewer at once than it was asked for."""
        missing = request.indices
        while missing:
            seed = request.seed + len(request.indices) - len(missing)
            part = Request(request.question_id, request.prompt, missing, request.max_tokens, seed)
            answers = await self._model.ask(part)
            responses = [
                StoredResponse(
                    question_id=part.question_id, index=i, text=a.text, finish_reason=a.finish_reason, seed=part.seed
                )
                for i, a in zip(missing, answers, strict=False)
            ]
            self._journal.append(responses)
            self._bar.update(len(responses))
            missing = missing[len(responses) :]


def _report(
    settings: SampleSettings, made: dict[str, Any], questions: int, received_now: int, retried: Counter[str]
) -> SampleReport:
    finish: Counter[str] = Counter()
    lengths = []
    for _, response in read_offsets(settings.output):
        finish[response.finish_reason or "not said"] += 1
        lengths.append(len(response.text))
    report = SampleReport(made, questions, len(lengths), received_now, dict(retried), dict(finish))
    charts: list[Chart] = [
        Histogram("Responses", "characters", lengths),
        Bars("Why responses ended", finish),
        Bars("Requests sent again", retried),
    ]
    write_stage_report(settings.output, f"Responses: {settings.output.name}", str(report), report.to_json(), charts)
    return report
