"""The rows that `data build` writes, as `data sample` and `data select` read them."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_solopo.data.row import Content


class ContextRow(BaseModel):
    """One pair of contexts that waits for responses."""

    model_config = ConfigDict(frozen=True, strict=True)

    id: str
    question_id: str
    prompt_short: Content
    prompt_long: Content
    question: str
    answers: list[str] = Field(min_length=1)
    evidence_depths: list[float]
    response_tokens: int = Field(ge=1)
    """Room for a response, in tokens, its end included."""


def read_contexts(path: Path) -> Iterator[tuple[int, ContextRow]]:
    """Every row with its byte offset. Raises ValueError naming the line and field of the first that is none."""
    offset = 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield offset, parse_context(line, f"{path}:{number}")
                offset += len(line)
    except OSError as error:
        raise ValueError(f"--contexts {path}: {error.strerror}") from None
    if not offset:
        raise ValueError(f"--contexts {path}: holds no row, expected the output of data build")


def parse_context(line: bytes, where: str) -> ContextRow:
    """One line of the file; raises ValueError."""
    try:
        return ContextRow.model_validate_json(line)
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(map(str, detail["loc"])) or "the whole line"
        raise ValueError(f"{where}: {field}: {detail['msg']} (expected a row of data build)") from None


def by_question(path: Path) -> Iterator[list[ContextRow]]:
    """The rows of one question after the other; they stand together in the file."""
    for _, rows in groupby((row for _, row in read_contexts(path)), key=lambda row: row.question_id):
        yield list(rows)


def to_line(row: dict[str, Any]) -> str:
    """A row as a line of a file."""
    return json.dumps(row, ensure_ascii=False) + "\n"
