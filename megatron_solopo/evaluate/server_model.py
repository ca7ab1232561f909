"""Generation by a server with OpenAI's API, at temperature 0."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.generation import Answer, Keep, MakeSample, generated
from megatron_solopo.evaluate.samples import Sample, Spec
from megatron_solopo.evaluate.settings import LongContextSettings
from megatron_solopo.generate.model import Request, RequestFailed
from megatron_solopo.generate.server import OpenAIServer


@dataclass(frozen=True)
class GreedySettings:
    """How a server is asked; see `data.openai_server.ServerSettings`."""

    server: str
    model: str
    concurrency: int
    timeout: float
    retries: int
    api_key_env: str | None
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    backoff: float = 1.0


def greedy_settings(settings: LongContextSettings) -> GreedySettings:
    """Of an evaluation with a server."""
    assert settings.server is not None
    return GreedySettings(
        settings.server,
        settings.model,
        settings.concurrency,
        settings.timeout,
        settings.retries,
        settings.api_key_env,
    )


class ServerModel:
    """See `generation.Generator`. Requests are under way side by side; the seconds of an answer are those since the
    one before it, so that they add up to the wall time."""

    device = "server"
    layout: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, settings: GreedySettings, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._tokenizer = tokenizer

    def run(self, batches: Sequence[Sequence[Spec]], build: MakeSample, keep: Keep) -> None:
        """Raises UserError where the server refuses, or does not answer after all retries."""
        asyncio.run(self._run([spec for batch in batches for spec in batch], build, keep))

    async def _run(self, specs: Sequence[Spec], build: MakeSample, keep: Keep) -> None:
        server = OpenAIServer(self._settings)
        waiting, last = iter(specs), time.perf_counter()

        async def work() -> None:
            nonlocal last
            for spec in waiting:
                sample = build(spec)
                if sample is None:
                    continue
                answer = await self._ask(server, sample)
                now = time.perf_counter()
                keep([generated(sample, answer, now - last)])
                last = now

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._settings.concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await server.aclose()

    async def _ask(self, server: OpenAIServer, sample: Sample) -> Answer:
        spec = sample.spec
        request = Request(spec.id, sample.prompt, (0,), spec.max_new_tokens, self._settings.seed)
        try:
            (answer,) = await server.ask(request)
        except RequestFailed as error:
            raise UserError(
                f"--server {self._settings.server}: no answer to {spec.id}: {error}; what was received is kept, "
                "the same command asks for the rest"
            ) from None
        # The server's own count is not in every answer; without it, an end token is not counted.
        tokens = answer.tokens
        if tokens is None:
            tokens = len(self._tokenizer.encode_continuation(answer.text))
        return Answer(answer.text, tokens, answer.finish_reason)
