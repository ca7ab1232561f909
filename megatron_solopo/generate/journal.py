"""Responses on disk as they come, in a journal that a killed program continues without losing or repeating one.

Each line behind the header is a response, or tells that a server refused to give some. A last line without a line break
was cut: a program that continues the file removes it and asks for its response again. A program that only reads the
file takes a last line that is whole, and refuses one that is not.
"""

import fcntl
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_solopo.errors import UserError, first_problem
from megatron_solopo.journal import append_lines, complete_lines, header_line, parse_header

_HEADER_BEGIN = b'{"journal": '
_HASH = re.compile("[0-9a-f]{64}")
# Of a header. Older versions did not keep it.
_ADDED_LATER = ("weights",)
SIDE_FIELD = "side"
"""Of a header of `data sample`: which contexts were answered. Older versions did not keep it, and asked short ones."""
PROMPTS_FIELD = "prompts"
"""Of a header of `data sample`: hash of what was asked."""
_FORMER_VALUES = {SIDE_FIELD: "short"}


class StoredResponse(BaseModel):
    """One response of a model."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    question_id: str
    """Name of what was asked: a question, a row of long contexts, a sample of an evaluation."""
    index: int = Field(ge=0)
    """Number of the sample, from 0."""
    text: str
    finish_reason: str | None = None
    """See `generate.model.Answer`."""
    seed: int | None = None
    """Seed of the request; the responses of one request share it."""
    reasoning: str | None = None
    """The thought before the text, where a server tells it apart."""
    prompt_tokens: int | None = None
    """Tokens of the prompt by the server's count; None where nobody said."""


class RefusedRequest(BaseModel):
    """Responses that a server refused for ever."""

    model_config = ConfigDict(frozen=True, strict=True)

    question_id: str
    indices: list[int]
    """Numbers of the samples."""
    refused: str
    """Why, in words that are the same for other requests."""
    detail: str
    """Why, in the words of the server."""


class Journal:
    """The file, opened to append. Use as a context manager.

    Args:
        path: Created where it does not exist, continued where it does.
        header: Must be the header of the existing file.
        command: The command that writes the file, for error messages.
        retry_refused: Treat what was refused before as missing.

    Attributes:
        received: Numbers of the samples in the file, by question.

    Raises:
        UserError: The file has another header, is no journal, or another process has it open.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], command: str = "data sample", retry_refused: bool = False
    ) -> None:
        self.received: defaultdict[str, set[int]] = defaultdict(set)
        self._refused: list[RefusedRequest] = []
        self._refused_indices: defaultdict[str, set[int]] = defaultdict(set)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a+b")
        try:
            self._lock(path)
            self._continue(path, header, command)
            if retry_refused:
                self._refused.clear()
                self._refused_indices.clear()
        except BaseException:
            self._stream.close()
            raise

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {path}: another process is writing it; wait, or name another") from None

    def _continue(self, path: Path, header: dict[str, Any], command: str) -> None:
        end = 0
        for start, line in _complete_lines(path):
            end = start + len(line)
            if not start:
                _check_header(path, header, command)
            else:
                self._remember(_parse(path, start, line))
        if not end:
            _check_cut_header(path, command)
        self._stream.truncate(end)
        if not end:
            append_lines(self._stream, [header_line(header)])

    @property
    def count(self) -> int:
        """Number of different samples in the file."""
        return sum(map(len, self.received.values()))

    def done(self, question_id: str) -> set[int]:
        """Numbers of a question's samples that came or were refused."""
        return self.received[question_id] | self._refused_indices[question_id]

    def refusals(self) -> list[RefusedRequest]:
        """What was refused and never came, each sample once."""
        return _unanswered(self._refused, self.received)

    def append(self, records: Sequence[StoredResponse | RefusedRequest]) -> None:
        """Write responses or refusals. They are on the disk when this returns."""
        append_lines(self._stream, [record.model_dump_json() for record in records])
        for record in records:
            self._remember(record)

    def _remember(self, record: StoredResponse | RefusedRequest) -> None:
        if isinstance(record, RefusedRequest):
            self._refused.append(record)
            self._refused_indices[record.question_id].update(record.indices)
        else:
            self.received[record.question_id].add(record.index)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a journal; None for a file of responses that has none."""
    return parse_header(next((line for _, line in _complete_lines(path)), b"{}"))


def read_offsets(path: Path) -> Iterator[tuple[int, StoredResponse]]:
    """Every response with its byte offset, in the order they came. Refusals are passed over.

    Raises UserError, naming the line, for a line that is no response.
    """
    for start, record in _records(path):
        if isinstance(record, StoredResponse):
            yield start, record


def read_refusals(path: Path) -> list[RefusedRequest]:
    """What was refused and never came, each sample once. Raises UserError as `read_offsets` does."""
    received: defaultdict[str, set[int]] = defaultdict(set)
    refused = []
    for _, record in _records(path):
        if isinstance(record, StoredResponse):
            received[record.question_id].add(record.index)
        else:
            refused.append(record)
    return _unanswered(refused, received)


def parse_response(path: Path, offset: int, line: bytes) -> StoredResponse:
    """The response on one line of the file. Raises UserError where it holds none."""
    try:
        return StoredResponse.model_validate_json(line)
    except ValidationError as error:
        with path.open("rb") as stream:
            number = stream.read(offset).count(b"\n") + 1
        raise UserError(f"{path}:{number}: {first_problem(error, 'the whole line')} (expected a response)") from None


def _records(path: Path) -> Iterator[tuple[int, StoredResponse | RefusedRequest]]:
    has_header = read_header(path) is not None
    end = 0
    for start, line in _complete_lines(path):
        end = start + len(line)
        if start or not has_header:
            yield start, _parse(path, start, line)
    yield from _read_last(path, end)


def _read_last(path: Path, start: int) -> Iterator[tuple[int, StoredResponse | RefusedRequest]]:
    """The record in the bytes from `start` on, which end without a line break. Raises UserError if it was cut."""
    with path.open("rb") as stream:
        stream.seek(start)
        line = stream.read()
    if not line:
        return
    try:
        yield start, _parse(path, start, line)
    except UserError as error:
        raise UserError(
            f"{error}; this last line was cut: complete the file with the command that wrote it, or remove the line"
        ) from None


def _parse(path: Path, offset: int, line: bytes) -> StoredResponse | RefusedRequest:
    try:
        return RefusedRequest.model_validate_json(line)
    except ValidationError:
        return parse_response(path, offset, line)


def _unanswered(refused: Sequence[RefusedRequest], received: Mapping[str, set[int]]) -> list[RefusedRequest]:
    seen: defaultdict[str, set[int]] = defaultdict(set)
    left = []
    for each in refused:
        indices = set(each.indices) - received.get(each.question_id, set()) - seen[each.question_id]
        seen[each.question_id] |= indices
        if indices:
            left.append(each.model_copy(update={"indices": sorted(indices)}))
    return left


def _complete_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        yield from complete_lines(path)
    except OSError as error:
        raise UserError(f"--responses {path}: {error.strerror}") from None


def _check_cut_header(path: Path, command: str) -> None:
    """Raise UserError if the only line of the file, which has no line break, cannot be the start of a header."""
    with path.open("rb") as stream:
        begin = stream.read(len(_HEADER_BEGIN))
    if not _HEADER_BEGIN.startswith(begin):
        raise _foreign(path, command)


def _foreign(path: Path, command: str) -> UserError:
    return UserError(f"--output {path}: exists and is not the output of {command}; name another")


def _check_header(path: Path, header: dict[str, Any], command: str) -> None:
    old = read_header(path)
    if old is None:
        raise _foreign(path, command)
    old = {name: value for name, value in _FORMER_VALUES.items() if name in header} | old
    unknown = [name for name in _ADDED_LATER if name in header and name not in old]
    names = {name for name in (old.keys() | header.keys()) - set(unknown) if old.get(name) != header.get(name)}
    if SIDE_FIELD in names:
        names -= {PROMPTS_FIELD}  # those of another side are others
    if differing := [_difference(name, old, header) for name in sorted(names)]:
        raise UserError(
            f"--output {path}: was begun with {', '.join(differing)}; name another output, or ask for the same"
        )
    if unknown:
        sys.stderr.write(f"note: {path}: an older version began it and did not keep {unknown[0]}: not compared\n")


def _difference(name: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    """What the file was begun with, in words. Hashes say nothing to a reader."""
    if name not in old:
        return f"no {name}, not {new[name]}"
    if name not in new:
        return f"{name} {old[name]}, not without"
    if isinstance(old[name], dict) and isinstance(new[name], dict):
        keys = sorted(key for key in old[name].keys() | new[name].keys() if old[name].get(key) != new[name].get(key))
        return f"other {name} ({', '.join(keys)})"
    if any(_HASH.fullmatch(str(value)) for value in (old[name], new[name])):
        return f"other {name}"
    return f"{name} {old[name]}, not {new[name]}"
