"""The rows that `data build` writes, as `data sample`, `data select` and `evaluate` read them."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_solopo.data.rows import Content
from megatron_solopo.errors import UserError, first_problem

_Row = TypeVar("_Row", bound=BaseModel)


class ContextRow(BaseModel):
    """A short and a long context of one question, without responses."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    id: str
    question_id: str
    prompt_short: Content
    prompt_long: Content
    question: str
    answers: list[str] = Field(min_length=1)
    evidence_depths: list[float]
    response_tokens: int = Field(ge=1)
    """Room for a response in tokens, its end included."""


def read_contexts(path: Path, row: type[_Row]) -> Iterator[tuple[int, int, _Row]]:
    """Every row with its line number and byte offset.

    Args:
        row: The fields to read: `ContextRow` or a model with fewer fields.

    Raises UserError with line and field of the first row that is not legal.
    """
    offset = 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, offset, parse_context(line, f"{path}:{number}", row)
                offset += len(line)
    except OSError as error:
        raise UserError(f"--contexts {path}: {error.strerror}") from None
    if not offset:
        raise UserError(f"--contexts {path}: holds no row, expected the output of data build")


def parse_context(line: bytes, where: str, row: type[_Row]) -> _Row:
    """Read one line of the file. Raises UserError."""
    try:
        return row.model_validate_json(line)
    except ValidationError as error:
        problem = first_problem(error, "the whole line")
        raise UserError(f"{where}: {problem} (expected a row of data build)") from None


def read_by_question(path: Path) -> Iterator[list[ContextRow]]:
    """The rows of one question after the other. They are neighbours in the file."""
    for _, rows in groupby((row for _, _, row in read_contexts(path, ContextRow)), key=lambda row: row.question_id):
        yield list(rows)


def to_line(row: dict[str, Any]) -> str:
    """A row as a line of a file."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
