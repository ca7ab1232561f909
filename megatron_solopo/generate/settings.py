"""The options of every command that may ask a server."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from pydantic import Field

from megatron_solopo.command_settings import CommandSettings
from megatron_solopo.data.template_arguments import TemplateKwargs


class ServerSettings(CommandSettings):
    """Which server is asked, and what happens when it fails or refuses."""

    server: str | None = None
    """Base URL of a server with OpenAI's API, such as http://localhost:8000/v1."""
    chat_template_kwargs: TemplateKwargs = Field(default={})
    """Arguments for the chat template of all prompts, such as '{"enable_thinking": false}'. Those of a row win. A
    server gets them in its requests."""
    concurrency: int = Field(default=32, ge=1)
    """Requests to the server that run at the same time."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that a request may take. A request to a vLLM server that stops may hang as long."""
    retries: int = Field(default=8, ge=0)
    """How often a request that fails is sent again."""
    backoff: float = Field(default=1.0, gt=0)
    """Seconds before the first retry. Each further retry waits twice as long, up to a minute."""
    api_key_env: str | None = None
    """Environment variable that holds the key of the server."""
    max_refused: float = Field(default=0.01, ge=0, le=1)
    """Largest share of the prompts that the server may refuse for ever, such as by its content filter. They are
    recorded, counted and passed over. One prompt may always be refused, unless this is 0."""
    retry_refused: bool = False
    """Ask again for what the server refused in an earlier run."""

    def contradictions(self) -> Iterator[str]:
        if self.server is None:
            return
        if not self.server.startswith(("http://", "https://")):
            yield f"--server {self.server}: must begin with http:// or https://"
            return
        try:
            host = urlsplit(self.server).hostname
        except ValueError as error:
            yield f"--server {self.server}: is no URL: {error}"
            return
        if not host:
            yield f"--server {self.server}: is no URL: it names no host"
