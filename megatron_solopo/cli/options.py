"""Options of a command, derived from its typed settings."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from megatron_solopo.command_settings import CommandSettings, alternatives, choices, describe_bounds, flag
from megatron_solopo.files import parse_json

PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

_Settings = TypeVar("_Settings", bound=CommandSettings)
_Others = ParamSpec("_Others")
_Command = Callable[..., None]


def settings_options(
    model: type[_Settings],
) -> Callable[[Callable[Concatenate[_Settings, _Others], None]], _Command]:
    """Give a command one option for each field of its settings, in the order of the fields, shared ones last.

    The command takes the settings as its first argument. A field's name becomes the flag and its docstring the help.
    A Literal becomes a choice, and a bool a switch. A tuple of paths becomes an option that may be repeated, and any
    other tuple a list with commas. A dict becomes a JSON object. A field without a default is required. The help shows
    the bounds of a number; the settings check them, so that a user learns of all mistakes at once.
    """

    def decorate(command: Callable[Concatenate[_Settings, _Others], None]) -> _Command:
        @functools.wraps(command)
        def run(*arguments: _Others.args, **values: _Others.kwargs) -> None:
            given = {name: values.pop(name) for name in model.model_fields}
            # An option that is not given has the field's own default.
            settings = model(**{name: value for name, value in given.items() if value is not None})
            command(settings, *arguments, **values)

        decorated: _Command = run
        own = model.__annotations__
        for name in sorted(reversed(model.model_fields), key=lambda name: name in own):
            decorated = _option(name, model.model_fields[name])(decorated)
        return decorated

    return decorate


def _option(name: str, field: FieldInfo) -> Callable[[_Command], _Command]:
    assert field.description, f"the field {name} has no docstring, which becomes the option's help"
    text = " ".join(field.description.split())
    if bounds := describe_bounds(field):
        text = f"{text} {bounds.capitalize()}."
    if field.is_required():
        return click.option(flag(name), name, type=_parameter_type(field), required=True, help=text)
    default = field.default
    if alternatives(field) == [bool]:
        switch = f"{flag(name)}/--no-{flag(name)[2:]}" if default else flag(name)
        return click.option(switch, name, is_flag=True, default=default, show_default=default, help=text)
    parameter_type = _parameter_type(field)
    if isinstance(parameter_type, _Listed):
        default = ",".join(map(str, default))
    shown = default not in (None, "", (), {})
    if parameter_type is _OBJECT:
        default = None
    repeated = parameter_type is PATH and isinstance(default, tuple)
    return click.option(
        flag(name), name, type=parameter_type, multiple=repeated, default=default, show_default=shown, help=text
    )


def _parameter_type(field: FieldInfo) -> Any:
    if legal := choices(field):
        return click.Choice(legal)
    (kind,) = alternatives(field)
    if get_origin(kind) is tuple:
        (item, _) = get_args(kind)
        return PATH if item is Path else _Listed(item)
    if get_origin(kind) is dict:
        return _OBJECT
    return PATH if kind is Path else kind


class _Listed(click.ParamType):  # type: ignore[type-arg]  # generic only in later releases of click
    """A list with commas, read into a tuple."""

    def __init__(self, item: type) -> None:
        self.name = f"{item.__name__},..."
        self._item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._item(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers with commas between them.", param, ctx)


class _Object(click.ParamType):  # type: ignore[type-arg]
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            found = parse_json(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value!r} is not valid JSON: {error}.", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is not a JSON object, such as '{{\"enable_thinking\": false}}'.", param, ctx)
        return found


_OBJECT = _Object()
