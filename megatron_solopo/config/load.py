"""Read and write a configuration: defaults, then the YAML file, then dotted overrides. Unknown keys are errors.

OmegaConf reads and merges these layers; the schema checks the result.
"""

import difflib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from megatron_solopo.config.schema import Config
from megatron_solopo.errors import UserError, describe_problem
from megatron_solopo.files import atomic_path

_HEADER = "# Written by megatron-solopo: the resolved configuration of this run."


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and dotted overrides (`objective.alpha=3`) over the defaults.

    Raises UserError with one line per mistake: the key, the value, the legal values and the nearest key.
    """
    return parse_config(read_values(path, overrides), f"{path} and the command line" if overrides else str(path))


def read_values(path: Path, overrides: Sequence[str]) -> Any:
    """The nested dictionary of a YAML file and dotted overrides, of any keys. Raises UserError if it is not legal."""
    merged = _read_yaml(path)
    for override in overrides:
        if not re.match(r"[A-Za-z_]", override) or "=" not in override:
            raise UserError(f"override {override!r}: expected key=value, for example objective.alpha=3")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"override {override!r}: {_one_line(error)}") from None
    try:
        return OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_one_line(error)}") from None


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a valid config: it is not UTF-8 text ({error.reason})") from None
    try:
        loaded = OmegaConf.load(io.StringIO(text))
    # OmegaConf raises OSError for a file that holds a bare number or word.
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: not a valid config: {_one_line(error)}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path}: not a valid config: expected keys and values, found a list")
    return loaded


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def parse_config(values: Any, source: str) -> Config:
    """Check a nested dictionary. Raises UserError with one line per mistake, behind the name `source`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [f"{source}: {_explain(detail)}" for detail in error.errors()]
        raise UserError("\n".join(lines)) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, complete or not at all. Call `check_not_by_hand` first."""
    with atomic_path(path) as temporary:
        values = OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
        temporary.write_text(f"{_HEADER}\n{values}", encoding="utf-8")


def check_not_by_hand(path: Path) -> None:
    """Raise UserError if the file at `path` exists and `save_config` did not write it."""
    if path.is_file() and not path.read_text(encoding="utf-8").startswith(_HEADER):
        raise UserError(f"{path}: was not written by a run and would be replaced; move it, or set another run_dir")


def _explain(detail: Any) -> str:
    hint = _nearest(detail["loc"]) if detail["type"] == "extra_forbidden" else _legal(detail)
    return describe_problem(detail, "the whole file") + hint


def _legal(detail: Any) -> str:
    """An example of a legal value, and what null means, for a value that the schema refuses."""
    if detail["type"] in ("missing", "value_error"):  # our own validators say what is legal
        return ""
    section: Any = Config
    names: list[str] = []
    for name in detail["loc"]:
        names.append(str(name))
        if isinstance(name, int):  # an item of a list of sections
            continue
        field = section.model_fields[name]
        nested = _section(field.annotation)
        if nested is None:
            break
        section = nested
    example = field.examples[0] if field.examples else field.get_default()
    if example is None or (field.is_required() and not field.examples):
        return ""
    null = re.search(r"null: ([^.]*)\.", field.description or "")
    also = f", or null ({' '.join(null[1].split())})" if null else ""
    return f"; for example {'.'.join(names)}={as_override(example)}{also}"


def as_override(value: Any) -> str:
    """A value as a person writes it behind `key=`."""
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {as_override(each)}' for key, each in value.items())}}}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _nearest(location: tuple[str | int, ...]) -> str:
    """Suggest the closest key of the same section, else a key of the same name in another section."""
    *parents, unknown = (part for part in location if isinstance(part, str))
    known = [key.split(".") for key in _all_keys(Config)]
    same_section = [key[-1] for key in known if key[:-1] == parents]
    nearest = [[*parents, name] for name in difflib.get_close_matches(unknown, same_section, n=1)]
    nearest = nearest or [key for key in known if key[-1] == unknown]
    if nearest:
        return f"; did you mean {' or '.join('.'.join(key) for key in nearest)}?"
    return f"; legal here: {', '.join(same_section)}"


def dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a configuration's dictionary, each with its key, such as `objective.alpha`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if (nested := _section(field.annotation)) is not None:
            keys += _all_keys(nested, f"{prefix}{name}.")
    return keys


def _section(annotation: Any) -> type[BaseModel] | None:
    """The class of a field that is a section, or may be one or null, or is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)
