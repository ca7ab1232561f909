"""Rows: their three kinds, their two forms, the files that hold them, and every check of them.

    triplet   {"id", "prompt_short", "prompt_long", "chosen", "rejected"}   for SoLoPO and the plain objectives
    pair      {"prompt", "chosen", "rejected"} and perhaps "id"             TRL's form, for the plain objectives
    instruction   {"prompt", "completion"} and perhaps "id"                 TRL's form, for the objective sft

Prompts and responses are strings, or lists of chat messages, see `data.messages`. A prompt of messages ends with a user
or tool message. A response of messages begins and ends with an assistant message. The answers of a pair may also be
whole conversations, see `data.conversations`. A row may have `evidence_depths`: the places of
the evidence in the long context. `tools` and `chat_template_kwargs` go to the chat template. Other fields are not read,
and are counted.

A file is of a kind that `data.row_files` reads. It holds rows of one kind.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from megatron_solopo.data.conversations import split_conversations
from megatron_solopo.data.messages import Content, IllegalValue, check_text, parse_prompt, parse_response, type_name
from megatron_solopo.data.row_files import Unit, read_file_rows, unit_of
from megatron_solopo.data.template_arguments import (
    ARGUMENT_FIELDS,
    KWARGS_FIELD,
    NO_ARGUMENTS,
    TOOLS_FIELD,
    TemplateArguments,
    check_kwargs,
    check_tools,
)
from megatron_solopo.errors import UserError
from megatron_solopo.files import counted, first_few, parse_json

Kind = Literal["triplet", "pair", "instruction"]
Form = Literal["text", "messages"]

PROMPT_FIELDS: dict[Kind, tuple[str, ...]] = {
    "triplet": ("prompt_short", "prompt_long"),
    "pair": ("prompt",),
    "instruction": ("prompt",),
}
RESPONSE_FIELDS: dict[Kind, tuple[str, ...]] = {
    "triplet": ("chosen", "rejected"),
    "pair": ("chosen", "rejected"),
    "instruction": ("completion",),
}
DEPTHS_FIELD = "evidence_depths"
"""Where each piece of evidence lies in the long context, from 0 (its start) to 1. A row may lack it."""

_RESPONSES = tuple(dict.fromkeys(name for names in RESPONSE_FIELDS.values() for name in names))
_FIELDS = ("id", *PROMPT_FIELDS["triplet"], "prompt", *_RESPONSES, DEPTHS_FIELD, *ARGUMENT_FIELDS)
# Of TRL's unpaired preferences, which look like instructions otherwise.
_LABEL = "label"
_PICTURES = ("images", "image")
_EXPECTED_FIELDS = (
    "prompt_short and prompt_long (a triplet), or prompt (a pair), with chosen and rejected; or prompt and completion "
    "(an instruction)"
)
_PLACES_SHOWN = 5


@dataclass(frozen=True)
class RowError:
    """One mistake in one row."""

    line: int
    """Counts from 1: lines of JSON lines, rows of other files. 0 is the file itself."""
    field: str
    """"" for the whole row."""
    reason: str


@dataclass
class PreferenceRow:
    """One row as read. A part that is not legal is None or missing, and `errors` says why."""

    line: int
    id: str | None = None
    kind: Kind | None = None
    form: Form | None = None
    contents: dict[str, Content] = field(default_factory=dict)
    """The legal prompts and responses by field name."""
    evidence_depths: list[float] = field(default_factory=list)
    """Empty if the row has none."""
    arguments: TemplateArguments = NO_ARGUMENTS
    """What the row gives the chat template."""
    unread_fields: tuple[str, ...] = ()
    """Fields that nothing reads."""
    errors: list[RowError] = field(default_factory=list)

    def reject(self, field_name: str, reason: str) -> None:
        """Add an error to this row."""
        self.errors.append(RowError(self.line, field_name, reason))


@dataclass(frozen=True)
class ValidationReport:
    """What a file holds, and all its mistakes in file order."""

    path: Path
    rows: int
    kind: Kind | None
    forms: tuple[Form, ...]
    """The forms that occur, sorted."""
    errors: list[RowError]
    unit: Unit = "line"
    """What the numbers of the errors count."""
    arguments: dict[str, int] = field(default_factory=dict)
    """Rows that give the chat template something, by its name."""
    unread_fields: dict[str, int] = field(default_factory=dict)
    """Rows that have a field which nothing reads, by its name."""

    def __str__(self) -> str:
        """The mistakes in file order, each with its first places, then one line of summary."""
        by_mistake: dict[tuple[str, str], list[int]] = {}
        for error in self.errors:
            by_mistake.setdefault((error.field, error.reason), []).append(error.line)
        lines = [
            ": ".join(filter(None, (self._places(numbers), field, reason)))
            for (field, reason), numbers in by_mistake.items()
        ]
        bad_lines = len({error.line for error in self.errors if error.line})
        if self.errors:
            bad = f"{bad_lines} of {self.rows} rows are bad" if self.rows else "no rows were read"
            summary = f"{counted(len(self.errors), 'error')}, {bad}"
        else:
            summary = f"{self.rows} rows of kind {self.kind}, no errors"
        return "\n".join([*lines, *self._notes(), f"{self.path}: {summary}"])

    def _notes(self) -> list[str]:
        notes = {"given to the chat template": self.arguments, "fields that are not read": self.unread_fields}
        return [f"{self.path}: {what}: {list_counts(counts)}" for what, counts in notes.items() if counts]

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON value. It lists every error."""
        return {**asdict(self), "path": str(self.path), "forms": list(self.forms)}

    def _places(self, numbers: list[int]) -> str:
        if numbers == [0]:
            return str(self.path)
        if len(numbers) == 1:
            return f"{self.path}:{numbers[0]}" if self.unit == "line" else f"{self.path}: row {numbers[0]}"
        return f"{self.path}: {len(numbers)} rows ({self.unit}s {first_few(numbers, _PLACES_SHOWN)})"


def validate_file(path: Path) -> ValidationReport:
    """Find every bad row of a file. A bad row raises nothing.

    The file is streamed: only its ids and the errors stay in memory.

    Raises UserError if the file itself cannot be read or has no rows.
    """
    unit = unit_of(path)
    rows = 0
    kind: Kind | None = None
    kind_line = 0
    forms: set[Form] = set()
    id_lines: dict[str, int] = {}
    errors: list[RowError] = []
    arguments, unread = Counter[str](), Counter[str]()
    for row in tqdm(read_rows(path), desc=f"Validating {path.name}", unit=" rows", disable=None):
        rows += 1
        if row.kind is not None and kind is None:
            kind, kind_line = row.kind, row.line
        if row.kind not in (None, kind):
            row.reject("", f"is of kind {row.kind}, but {unit} {kind_line} of kind {kind}; one file holds one kind")
        if row.form is not None:
            forms.add(row.form)
        if row.id is not None and id_lines.setdefault(row.id, row.line) != row.line:
            row.reject("id", f"{row.id!r} is already the id of {unit} {id_lines[row.id]}")
        arguments.update(row.arguments.names())
        unread.update(row.unread_fields)
        errors += row.errors
    if not rows:
        raise UserError(f"{path}: has no rows")
    return ValidationReport(path, rows, kind, tuple(sorted(forms)), errors, unit, dict(arguments), dict(unread))


def read_rows(path: Path) -> Iterator[PreferenceRow]:
    """Stream the rows of a file, good and bad. Raises UserError if the file itself cannot be read."""
    for read in read_file_rows(path, (*_FIELDS, _LABEL, *_PICTURES)):
        if read.problem:
            yield _bad_row(read.number, read.problem)
        else:
            yield parse_row(read.number, read.value, read.left_out)


def _bad_row(line: int, reason: str) -> PreferenceRow:
    """A row that could not be read at all."""
    return PreferenceRow(line, errors=[RowError(line, "", reason)])


def parse_row(line: int, value: Any, left_out: tuple[str, ...] = ()) -> PreferenceRow:
    """Check one row by itself: types, missing and blank fields, roles, equal responses.

    Args:
        left_out: columns of its file that were not read.
    """
    if not isinstance(value, dict):
        return _bad_row(line, f"expected a JSON object, got {type_name(value)}")
    if not any(name in value for name in _FIELDS if name != "id"):
        names = [*value, *left_out]
        found = ", ".join(names[:_PLACES_SHOWN]) or "no fields"
        hint = "; the guide to data shows how to choose a pair of completions" if "completions" in names else ""
        return _bad_row(line, f"is no preference row: it has {found}; expected {_EXPECTED_FIELDS}{hint}")
    row = PreferenceRow(line)
    try:
        value = split_conversations(value)
    except IllegalValue as error:
        row.reject("prompt", str(error))
        return row
    row.kind = _parse_kind(value, row)
    row.id = _parse_id(value, row)
    if row.kind == "instruction" and isinstance(value.get(_LABEL), bool):
        row.reject(
            _LABEL, "makes the row an unpaired preference, which is not read; write pairs, or the good rows alone"
        )
    for name in _PICTURES:
        if value.get(name):
            row.reject(name, "holds pictures, which are not read; take the rows without pictures")
    kind = row.kind or "pair"
    for name in (*(PROMPT_FIELDS[kind] if row.kind else ()), *RESPONSE_FIELDS[kind]):
        try:
            row.contents[name] = _parse_content(value.get(name), is_response=name in _RESPONSES)
        except IllegalValue as error:
            row.reject(name, str(error))
    try:
        row.evidence_depths = _parse_depths(value.get(DEPTHS_FIELD))
    except IllegalValue as error:
        row.reject(DEPTHS_FIELD, str(error))
    row.arguments = _parse_arguments(value, row)
    others = (name for name, given in value.items() if name not in _FIELDS and given is not None)
    row.unread_fields = (*others, *left_out)
    _check_consistency(row)
    return row


def _parse_arguments(value: dict[str, Any], row: PreferenceRow) -> TemplateArguments:
    """Some tools write these fields as JSON text, since their objects differ from row to row."""
    found: dict[str, Any] = {}
    for name, check in ((KWARGS_FIELD, check_kwargs), (TOOLS_FIELD, check_tools)):
        try:
            given = value.get(name)
            found[name] = check(parse_json(given) if isinstance(given, str) else given)
        except json.JSONDecodeError as error:
            row.reject(name, f"is text that is not valid JSON: {error.msg} at column {error.colno}")
        except UserError as error:
            row.reject(name, str(error))
        except (ValueError, RecursionError) as error:  # a key that is there twice, too many brackets
            row.reject(name, f"is text that is not valid JSON: {error}")
    return TemplateArguments(found.get(KWARGS_FIELD, {}), found.get(TOOLS_FIELD))


def _parse_kind(value: dict[str, Any], row: PreferenceRow) -> Kind | None:
    given = {name for name in _FIELDS if value.get(name) is not None}
    kinds: list[Kind] = []
    if given & {"prompt_short", "prompt_long"}:
        kinds.append("triplet")
    if "prompt" in given:
        kinds.append("instruction" if "completion" in given else "pair")
    if "completion" in given and (more := given & {"prompt_short", "prompt_long", "chosen", "rejected"}):
        row.reject("completion", f"does not go with {', '.join(sorted(more))}; an instruction has a prompt beside it")
        return None
    if len(kinds) == 1:
        return kinds[0]
    found = "both, so its kind is unclear" if kinds else "neither"
    if not kinds and all(isinstance(value.get(name), str) for name in ("chosen", "rejected")):
        found += "; if both answers begin with the prompt, write it into its own field, as trl.extract_prompt does"
    row.reject("prompt", f"expected prompt_short and prompt_long (a triplet), or prompt (a pair); the row has {found}")
    return None


def _parse_id(value: dict[str, Any], row: PreferenceRow) -> str | None:
    given = value.get("id")
    if given is None and row.kind != "triplet":
        return str(row.line)
    try:
        if given is None:
            raise IllegalValue("is missing or null")
        if not isinstance(given, str | int) or isinstance(given, bool):
            raise IllegalValue(f"expected a string or an integer, got {type_name(given)}")
        return check_text(str(given))
    except IllegalValue as error:
        row.reject("id", str(error))
        return None


def _parse_content(value: Any, *, is_response: bool) -> Content:
    if value is None:
        raise IllegalValue("is missing or null")
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list):
        raise IllegalValue(f"expected a string or a list of messages, got {type_name(value)}")
    return parse_response(value) if is_response else parse_prompt(value)


def _parse_depths(value: Any) -> list[float]:
    if value is None:
        return []
    numbers = isinstance(value, list) and all(isinstance(each, int | float) for each in value)
    if not numbers or not all(0 <= each <= 1 for each in value):
        raise IllegalValue("expected a list of numbers from 0 to 1")
    return [float(each) for each in value]


def _check_consistency(row: PreferenceRow) -> None:
    """Check what involves several fields: all have one form, and the two responses differ."""
    forms: dict[str, Form] = {
        name: "text" if isinstance(content, str) else "messages" for name, content in row.contents.items()
    }
    first = next(iter(forms), None)
    for name, form in forms.items():
        if first is not None and form != forms[first]:
            row.reject(name, f"is {form}, but {first} is {forms[first]}; a row is all strings or all messages")
    if len(set(forms.values())) == 1:
        row.form = next(iter(forms.values()))
    chosen, rejected = (row.contents.get(name) for name in ("chosen", "rejected"))
    if chosen is not None and rejected is not None and _comparable(chosen) == _comparable(rejected):
        row.reject("rejected", "is the same as chosen")


def _comparable(response: Content) -> Any:
    """A response without white space at the ends of its texts."""
    if isinstance(response, str):
        return response.strip()
    return [{key: each.strip() if isinstance(each, str) else each for key, each in one.items()} for one in response]


def list_counts(counts: Mapping[str, int]) -> str:
    """Such as "source (12 rows), score (1 row)"."""
    return ", ".join(f"{name} ({counted(count, 'row')})" for name, count in counts.items())
