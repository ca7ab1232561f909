"""One preference row: its two kinds, its two forms, and every check that needs no other row.

    triplet   {"id", "prompt_short", "prompt_long", "chosen", "rejected"}   for SoLoPO and the plain objectives
    pair      {"prompt", "chosen", "rejected"} and perhaps "id"             TRL's form, for the plain objectives

Prompts and responses are strings, or lists of chat messages {"role", "content"}: a prompt then ends with a
user message and a response is exactly one assistant message. `evidence_depths`, where a row has it, says where in
the long context the evidence lies; other fields are ignored.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_solopo.errors import UserError

Kind = Literal["triplet", "pair"]
Form = Literal["text", "messages"]
Message = dict[str, str]
Content = str | list[Message]
Template = Literal["chat", "plain"]
"""How a row becomes text: by the chat template, or as it is."""

PROMPT_FIELDS: dict[Kind, tuple[str, ...]] = {"triplet": ("prompt_short", "prompt_long"), "pair": ("prompt",)}
RESPONSE_FIELDS = ("chosen", "rejected")
DEPTHS_FIELD = "evidence_depths"
"""May be in a row: where each piece of evidence lies in the long context, from 0 (its start) to 1."""
FIELDS = ("id", *PROMPT_FIELDS["triplet"], *PROMPT_FIELDS["pair"], *RESPONSE_FIELDS, DEPTHS_FIELD)

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class RowError:
    """One thing wrong with one row.

    `line` counts from 1 (a row number in parquet), 0 is the file itself; `field` is "" for the whole row.
    """

    line: int
    field: str
    reason: str


@dataclass
class PreferenceRow:
    """One row as read; what could not be read is None, and `errors` says why."""

    line: int
    id: str | None = None
    kind: Kind | None = None
    form: Form | None = None
    contents: dict[str, Content] = field(default_factory=dict)
    """The legal prompts and responses by field name, messages reduced to role and content."""
    evidence_depths: list[float] = field(default_factory=list)
    """Empty where the row does not say."""
    errors: list[RowError] = field(default_factory=list)

    def reject(self, field_name: str, reason: str) -> None:
        """Add an error to this row."""
        self.errors.append(RowError(self.line, field_name, reason))


def parse_row(line: int, value: Any) -> PreferenceRow:
    """Check one row by itself: types, missing and blank fields, roles, equal responses."""
    if not isinstance(value, dict):
        return bad_row(line, f"expected a JSON object, got {_type_name(value)}")
    row = PreferenceRow(line)
    row.kind = _parse_kind(value, row)
    row.id = _parse_id(value, row)
    for name in (*PROMPT_FIELDS.get(row.kind, ()), *RESPONSE_FIELDS) if row.kind else RESPONSE_FIELDS:
        try:
            row.contents[name] = _parse_content(value.get(name), is_response=name in RESPONSE_FIELDS)
        except ValueError as error:
            row.reject(name, str(error))
    try:
        row.evidence_depths = _parse_depths(value.get(DEPTHS_FIELD))
    except ValueError as error:
        row.reject(DEPTHS_FIELD, str(error))
    _check_together(row)
    return row


def bad_row(line: int, reason: str) -> PreferenceRow:
    """A row that could not be read at all."""
    return PreferenceRow(line, errors=[RowError(line, "", reason)])


def _parse_kind(value: dict[str, Any], row: PreferenceRow) -> Kind | None:
    kinds = [kind for kind, names in PROMPT_FIELDS.items() if any(value.get(name) is not None for name in names)]
    if len(kinds) == 1:
        return kinds[0]
    found = "both, so its kind is unclear" if kinds else "neither"
    row.reject("prompt", f"expected prompt_short and prompt_long (a triplet), or prompt (a pair); the row has {found}")
    return None


def _parse_id(value: dict[str, Any], row: PreferenceRow) -> str | None:
    given = value.get("id")
    if given is None and row.kind == "pair":
        return str(row.line)
    if given is None:
        row.reject("id", "is missing or null")
    elif not isinstance(given, str | int) or isinstance(given, bool):
        row.reject("id", f"expected a string or an integer, got {_type_name(given)}")
    else:
        try:
            return _check_text(str(given))
        except ValueError as error:
            row.reject("id", str(error))
    return None


def _parse_content(value: Any, *, is_response: bool) -> Content:
    """A legal prompt or response; raises UserError with the reason where it is not one."""
    if value is None:
        raise UserError("is missing or null")
    if isinstance(value, str):
        return _check_text(value)
    if not isinstance(value, list):
        raise UserError(f"expected a string or a list of messages, got {_type_name(value)}")
    messages = [_parse_message(message, index) for index, message in enumerate(value)]
    roles = [message["role"] for message in messages]
    if is_response and roles != ["assistant"]:
        raise UserError(f"expected exactly one assistant message, got roles {roles}")
    if not is_response and roles[-1:] != ["user"]:
        raise UserError(f"expected messages that end with a user message, got roles {roles}")
    return messages


def _parse_message(value: Any, index: int) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"message {index}: expected an object with role and content, got {_type_name(value)}")
    unknown = sorted(key for key, entry in value.items() if key not in ("role", "content") and entry is not None)
    if unknown:
        raise UserError(f"message {index}: unknown key {unknown[0]!r}; legal: role, content")
    role, content = value.get("role"), value.get("content")
    if role not in _ROLES:
        raise UserError(f"message {index}: role {role!r}; legal: {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"message {index}: content: expected a string, got {_type_name(content)}")
    # An empty system message is how a chat template's default one is turned off.
    if role != "system" or content:
        try:
            _check_text(content)
        except ValueError as error:
            raise UserError(f"message {index}: content {error}") from None
    return {"role": role, "content": content}


def _parse_depths(value: Any) -> list[float]:
    if value is None:
        return []
    numbers = isinstance(value, list) and all(isinstance(each, int | float) for each in value)
    if not numbers or not all(0 <= each <= 1 for each in value):
        raise UserError("expected a list of numbers from 0 to 1")
    return [float(each) for each in value]


def _check_text(text: str) -> str:
    if not text.strip():
        raise UserError("is blank" if text else "is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"holds a lone surrogate at character {error.start + 1}, which is not Unicode text") from None
    return text


def _check_together(row: PreferenceRow) -> None:
    """Check what involves several fields: one form in a row, and two different responses."""
    forms: dict[str, Form] = {
        name: "text" if isinstance(content, str) else "messages" for name, content in row.contents.items()
    }
    first = next(iter(forms), None)
    for name, form in forms.items():
        if first is not None and form != forms[first]:
            row.reject(name, f"is {form}, but {first} is {forms[first]}; a row is all strings or all messages")
    if len(set(forms.values())) == 1:
        row.form = next(iter(forms.values()))
    chosen, rejected = (row.contents.get(name) for name in RESPONSE_FIELDS)
    if chosen is not None and rejected is not None and _plain_text(chosen) == _plain_text(rejected):
        row.reject("rejected", "is the same as chosen")


def _plain_text(response: Content) -> str:
    return (response if isinstance(response, str) else response[0]["content"]).strip()


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"a {'number' if isinstance(value, int | float) else type(value).__name__}")
