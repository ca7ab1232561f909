"""Ask a model for responses to short contexts, many per question.

The model is a Hugging Face directory, or it is behind a server with OpenAI's API. Responses go into a journal as they
come. A run that starts again, after a kill or for more samples, asks only for the missing ones.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_solopo.checksums import directory_fingerprint
from megatron_solopo.errors import UserError
from megatron_solopo.files import sha256_file
from megatron_solopo.generate.journal import Journal, StoredResponse, read_offsets
from megatron_solopo.generate.model import Answer, Model, Request
from megatron_solopo.progress import bar_style
from megatron_solopo.triplets.context_rows import ContextRow, parse_context, read_contexts
from megatron_solopo.triplets.report import Bars, Chart, Histogram, check_output, provenance, write_stage_report
from megatron_solopo.triplets.seeds import derived_seed
from megatron_solopo.triplets.settings import END_TOKENS, SampleSettings


@dataclass(frozen=True)
class SampleReport:
    """What a run of `data sample` did, as `report.json` holds it."""

    provenance: dict[str, Any]
    questions: int
    responses: int
    """Responses in the journal at the end."""
    received_now: int
    """Responses that this run received."""
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


@dataclass(frozen=True)
class _Missing:
    """Samples to ask for in one request."""

    question_id: str
    offset: int
    """Place of the question's first row in the file. All its rows have the same short context."""
    indices: tuple[int, ...]


def sample(settings: SampleSettings) -> SampleReport:
    """Complete the journal `settings.output`.

    Raises UserError if the journal belongs to other settings, if the model refuses the requests, or if some requests
    got no answer. What was received stays, and the same command asks for the rest.
    """
    check_output(settings.output, True, [settings.contexts])
    questions, response_tokens = _index(settings.contexts)
    max_tokens = response_tokens - END_TOKENS if settings.max_tokens is None else settings.max_tokens
    if not 1 <= max_tokens <= response_tokens:
        raise UserError(
            f"--max-tokens {max_tokens}: the contexts leave room for {response_tokens} tokens, see --response-tokens"
        )
    made = provenance([settings.contexts], settings.seed, settings)
    with Journal(settings.output, _header(settings, max_tokens)) as journal:
        before = journal.count
        model = _load(settings)
        missing = list(_missing(settings, questions, journal))
        _ask(settings, model, missing, journal, max_tokens)
        received_now = journal.count - before
    return _report(settings, made, len(questions), received_now, model.retried)


def _header(settings: SampleSettings, max_tokens: int) -> dict[str, Any]:
    """Everything that decides a response; neither how many there are nor which server gives them."""
    names = ("model", "temperature", "top_p", "seed")
    header = {name: getattr(settings, name) for name in names}
    if settings.server is None and Path(settings.model).is_dir():
        header["weights"] = directory_fingerprint(Path(settings.model))
    return header | {"max_tokens": max_tokens, "contexts": sha256_file(settings.contexts)}


def _index(path: Path) -> tuple[dict[str, int], int]:
    """Byte offset of each question's first row, and the least `response_tokens` in the file."""
    offsets: dict[str, int] = {}
    least = 0
    for _, offset, row in read_contexts(path, ContextRow):
        offsets.setdefault(row.question_id, offset)
        least = min(least or row.response_tokens, row.response_tokens)
    return offsets, least


def _load(settings: SampleSettings) -> Model:
    if settings.server is not None:
        from megatron_solopo.generate.server import OpenAIServer

        return OpenAIServer(
            settings.server,
            settings.model,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            retries=settings.retries,
            backoff=settings.backoff,
            api_key_env=settings.api_key_env,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
    import torch

    from megatron_solopo.data.tokenizer import load_tokenizer
    from megatron_solopo.generate.transformers import TransformersModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(settings.model)
    return TransformersModel(settings.model, tokenizer, device, temperature=settings.temperature, top_p=settings.top_p)


def _missing(settings: SampleSettings, questions: dict[str, int], journal: Journal) -> Iterator[_Missing]:
    size = settings.samples_per_request
    for question, offset in questions.items():
        indices = sorted(set(range(settings.num_samples)) - journal.received[question])
        for start in range(0, len(indices), size):
            yield _Missing(question, offset, tuple(indices[start : start + size]))


def _ask(
    settings: SampleSettings, model: Model, missing: Sequence[_Missing], journal: Journal, max_tokens: int
) -> None:
    """Ask for the missing samples and keep them as they come."""
    total = sum(len(each.indices) for each in missing)
    with (
        settings.contexts.open("rb") as stream,
        closing(tqdm(total=total, desc="Sampling", **bar_style("responses"))) as bar,
    ):

        def build(item: _Missing) -> Request:
            stream.seek(item.offset)
            prompt = parse_context(stream.readline(), str(settings.contexts), ContextRow).prompt_short
            seed = derived_seed(settings.seed, f"{item.question_id}:{item.indices[0]}")
            return Request(item.question_id, prompt, item.indices, max_tokens, seed)

        def keep(request: Request, answers: Sequence[Answer], seconds: float) -> None:
            journal.append(
                [
                    StoredResponse(
                        question_id=request.question_id,
                        index=index,
                        text=answer.text,
                        finish_reason=answer.finish_reason,
                        seed=request.seed,
                    )
                    for index, answer in zip(request.indices, answers, strict=False)
                ]
            )
            bar.update(len(answers))

        model.answer([[item] for item in missing], build, keep)


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
