"""The rows that `data build` writes, as `data sample`, `data select` and `evaluate` read them."""

import json
import weakref
from collections.abc import Iterator
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from megatron_solopo.config import Context
from megatron_solopo.data.messages import Content
from megatron_solopo.data.row_files import open_as_lines
from megatron_solopo.data.template_arguments import TemplateArguments, check_kwargs, check_tools
from megatron_solopo.errors import UserError, first_problem

_Row = TypeVar("_Row", bound=BaseModel)


class RowWithArguments(BaseModel):
    """A row that may give the chat template something beside the messages."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    chat_template_kwargs: Annotated[dict[str, Any] | None, AfterValidator(check_kwargs)] = None
    tools: Annotated[list[dict[str, Any]] | None, AfterValidator(check_tools)] = None

    def arguments(self, kwargs: dict[str, Any]) -> TemplateArguments:
        """The row's own, and those of all rows, which `kwargs` has."""
        return TemplateArguments(self.chat_template_kwargs or {}, self.tools).over(kwargs)


class ContextRow(RowWithArguments):
    """A short and a long context of one question, without responses."""

    id: str
    question_id: str
    prompt_short: Content
    prompt_long: Content
    question: str
    answers: list[str] = Field(min_length=1)
    evidence_depths: list[float]
    response_tokens: int = Field(ge=1)
    """Room for a response in tokens, its end included."""
    short_tokens: int | None = None
    """Tokens of the short prompt and the room for a response, by the tokenizer of `data build`."""
    long_tokens: int | None = None
    """The same of the long prompt."""

    def prompt(self, side: Context) -> Content:
        """The prompt of one side."""
        return self.prompt_short if side == "short" else self.prompt_long

    def prompt_tokens(self, side: Context) -> int | None:
        """Tokens of that prompt, by the tokenizer of `data build`; None where nobody counted them."""
        total = self.short_tokens if side == "short" else self.long_tokens
        return None if total is None else total - self.response_tokens

    def asked_as(self, side: Context) -> str:
        """Name of the prompt in a journal. Rows of one question share the short prompt, and so its responses."""
        return self.question_id if side == "short" else self.id


class ContextFile:
    """The rows of a file, in order or again by their offset. Several threads may read rows again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = open_as_lines(path)
        weakref.finalize(self, self._stream.close)
        self._start = self._stream.tell()
        self._lock = Lock()

    def rows(self, row: type[_Row]) -> Iterator[tuple[int, int, _Row]]:
        """Every row with its number and its offset. Nothing else may read while this goes on.

        Args:
            row: The fields to read: `ContextRow` or a model with fewer fields.

        Raises UserError with number and field of the first row that is not legal.
        """
        offset = self._stream.seek(self._start)
        for number, line in enumerate(self._stream, start=1):
            yield number, offset, self._parse(line, f"{self.path}:{number}", row)
            offset += len(line)
        if offset == self._start:
            raise UserError(f"--contexts {self.path}: holds no row, expected the output of data build")

    def row_at(self, offset: int, row: type[_Row]) -> _Row:
        """Read a row again."""
        with self._lock:
            self._stream.seek(offset)
            line = self._stream.readline()
        return self._parse(line, str(self.path), row)

    @staticmethod
    def _parse(line: bytes, where: str, row: type[_Row]) -> _Row:
        try:
            return row.model_validate_json(line)
        except ValidationError as error:
            problem = first_problem(error, "the whole line")
            raise UserError(f"{where}: {problem} (expected a row of data build)") from None


def read_by_question(path: Path) -> Iterator[list[ContextRow]]:
    """The rows of one question after the other. They are neighbours in the file."""
    rows = (row for _, _, row in ContextFile(path).rows(ContextRow))
    for _, group in groupby(rows, key=lambda row: row.question_id):
        yield list(group)


def prompts_hash(contexts: ContextFile, side: Context) -> str:
    """Hash of all that a model is asked on one side: names, prompts and arguments of the template, without the rest.

    Files that differ in the other side alone have the same, so that responses to the short contexts fit long ones of
    every length.
    """
    digest, last = sha256(), None
    for _, _, row in contexts.rows(ContextRow):
        if (name := row.asked_as(side)) != last:
            asked = {"name": name, "prompt": row.prompt(side)} | row.arguments({}).fields()
            digest.update(json.dumps(asked, sort_keys=True).encode() + b"\n")
        last = name
    return digest.hexdigest()


def to_line(row: dict[str, Any]) -> str:
    """A row as a line of a file."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
