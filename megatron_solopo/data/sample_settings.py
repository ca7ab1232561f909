"""What a user asks of `data sample`, and what is illegal about it."""

from dataclasses import dataclass
from pathlib import Path

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
            raise ValueError("\n".join(mistakes))
