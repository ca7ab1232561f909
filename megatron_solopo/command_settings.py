"""The base class of what a user asks of one command. Its fields are checked together."""

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from megatron_solopo.errors import UserError


class CommandSettings(BaseModel):
    """Options of a command; `cli.options` derives the command line from the fields and their docstrings.

    Raises UserError, one line per mistake, for a value out of its bounds and for options that exclude each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            mistakes = [self._mistake(detail) for detail in error.errors(include_url=False)]
            if None in mistakes:
                raise
            # A value that fits no part of a union has one error for each part.
            raise UserError("\n".join(dict.fromkeys(filter(None, mistakes)))) from None

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if found := list(self.contradictions()):
            raise UserError("\n".join(found))
        return self

    def contradictions(self) -> Iterator[str]:
        """One line for each mistake that more than one field decides."""
        yield from ()

    @classmethod
    def _mistake(cls, detail: Any) -> str | None:
        """The line for a user, or None where only a fault of the calling code can be the cause."""
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            return str(cause)
        if not detail["loc"] or detail["loc"][0] not in cls.model_fields:
            return None
        name = str(detail["loc"][0])
        field = cls.model_fields[name]
        if detail["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
            return f"{flag(name)} {detail['input']}: must be {describe_bounds(field)}"
        if detail["type"] == "finite_number":
            return f"{flag(name)} {detail['input']}: must be a finite number"
        if detail["type"] == "literal_error":
            return f"{flag(name)} {detail['input']}: legal: {', '.join(choices(field))}"
        return None


def flag(field: str) -> str:
    """The option that sets a field: "long_tokens" is "--long-tokens"."""
    return f"--{field.replace('_', '-')}"


def alternatives(field: FieldInfo) -> list[Any]:
    """The types of a field's union, without None."""

    def walk(annotation: Any) -> Iterator[Any]:
        if get_origin(annotation) in (Union, UnionType):
            for each in get_args(annotation):
                yield from walk(each)
        elif get_origin(annotation) is Annotated:
            yield from walk(get_args(annotation)[0])
        elif annotation is not NoneType:
            yield annotation

    return list(walk(field.annotation))


def choices(field: FieldInfo) -> list[str]:
    """The values of a field that takes a Literal; empty for other fields."""
    return [choice for each in alternatives(field) if get_origin(each) is Literal for choice in get_args(each)]


def describe_bounds(field: FieldInfo) -> str:
    """Such as "above 0 and at most 1"."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = (
        f"{word} {getattr(bound, name)}"
        for bound in _constraints(field)
        for name, word in words.items()
        if hasattr(bound, name)
    )
    return " and ".join(bounds)


def _constraints(field: FieldInfo) -> Iterator[Any]:
    """What limits the values of a field, or those of one type of its union."""
    yield from field.metadata
    for each in get_args(field.annotation):
        for constraint in get_args(each)[1:] if get_origin(each) is Annotated else ():
            yield from constraint.metadata if isinstance(constraint, FieldInfo) else (constraint,)
