"""A server that answers for the model of a round, from its start until it has stopped."""

import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import openai
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tied_process import tied_process
from tqdm import tqdm

from megatron_solopo.errors import UserError
from megatron_solopo.generate.server import served_models

SERVED_NAME = "policy"
_MODEL = "{model}"
_POLL_SECONDS = 0.2
_STOP_SECONDS = 60
"""vLLM waits without end for the requests of other clients."""


class Server(BaseModel):
    """An OpenAI-compatible server."""

    model_config = ConfigDict(extra="forbid")
    command: str
    """Starts it. {model} is the directory of the model, and the name that it serves must be `policy`."""
    url: str = Field(pattern="^https?://")
    """Such as http://localhost:8000/v1."""
    start_minutes: float = Field(default=30, gt=0)
    """How long a start may take."""

    @field_validator("command")
    @classmethod
    def _check_command(cls, command: str) -> str:
        if _MODEL not in command:
            raise UserError(f"must hold {_MODEL}, for which each round puts the directory of its model")
        return command


@contextmanager
def serving(
    server: Server, model: Path, lock: Path, log: Path, api_key_env: str | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """Have the server answer for a model; stop it, with all that it started, at the end.

    Args:
        lock: See `tied_process`.
        log: Takes what it prints.
        api_key_env: Variable that holds its key.

    Raises ClickException if it does not start, or if another server answers in its place.
    """
    if isinstance(found := _served_names(server, api_key_env), list):
        raise click.ClickException(
            f"{server.url}: a server answers already ({', '.join(found)}), and it may have another model; stop it, or "
            "change the port in server.command and server.url"
        )
    command = [part.replace(_MODEL, str(model)) for part in shlex.split(server.command)]
    with log.open("a", encoding="utf-8") as stream, tied_process(command, lock, stream, _STOP_SECONDS) as process:
        _wait_for(server, process, log, api_key_env)
        yield process


def _wait_for(server: Server, process: "subprocess.Popen[bytes]", log: Path, api_key_env: str | None) -> None:
    deadline, said = time.monotonic() + 60 * server.start_minutes, ""
    while True:
        if process.poll() is not None:
            raise click.ClickException(f"{server.command}: ended with code {process.returncode}; see {log}")
        found = _served_names(server, api_key_env)
        if isinstance(found, list):
            if SERVED_NAME not in found:
                raise click.ClickException(f"{server.url} serves {', '.join(found)}, not {SERVED_NAME}")
            return
        if time.monotonic() > deadline:
            limit = f"server.start_minutes={server.start_minutes:g}"
            raise click.ClickException(f"{server.url}: no answer after {limit} ({found}); see {log}")
        if found != said:
            said = found
            tqdm.write(f"waiting for {server.url}: {said}; see {log}")
        time.sleep(_POLL_SECONDS)


def _served_names(server: Server, api_key_env: str | None) -> list[str] | str:
    """Names of the models that a server has. A text says why it does not tell them."""
    try:
        return [each.id for each in served_models(server.url, api_key_env)]
    except openai.APIStatusError as error:
        return f"HTTP {error.status_code} from {error.request.url}"
    except openai.APIConnectionError as error:
        return str(error.__cause__ or error)
    except ValidationError:
        return "its reply is no list of models"
