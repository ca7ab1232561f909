"""Reads and writes a configuration: defaults, then YAML, then dotted overrides; unknown keys are refused.

OmegaConf reads and merges the layers; `config` checks what comes out.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from megatron_solopo.config.schema import Config
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path

_HEADER = "# Written by megatron-solopo: the resolved configuration of this run."


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and dotted overrides (`objective.alpha=3`) over the defaults.

    Raises UserError with one line per mistake: the key, the value, the legal values, the nearest key.
    """
    merged = _read_yaml(path)
    for override in overrides:
        if not re.match(r"[A-Za-z_]", override) or "=" not in override:
            raise UserError(f"override {override!r}: expected key=value, for example objective.alpha=3")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"override {override!r}: {_one_line(error)}") from None
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    return parse_config(values, source=str(path))


def _read_yaml(path: Path) -> Any:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, expected a YAML file") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read by this user") from None
    # OmegaConf says OSError where the file holds a bare number or word.
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: not a valid config: {_one_line(error)}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path}: not a valid config: expected keys and values, found a list")
    return loaded


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def parse_config(values: Any, source: str) -> Config:
    """Check a nested dictionary; `source` names it in the error."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [f"{source}: {_explain(detail)}" for detail in error.errors()]
        raise UserError("\n".join(lines)) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, complete or not at all; ask `check_not_by_hand` first."""
    with atomic_path(path) as temporary:
        values = OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
        temporary.write_text(f"{_HEADER}\n{values}", encoding="utf-8")


def check_not_by_hand(path: Path) -> None:
    """Raise ValueError if there is a file at `path` that `save_config` has not written."""
    if path.is_file() and not path.read_text(encoding="utf-8").startswith(_HEADER):
        raise UserError(f"{path}: was not written by a run, and would be replaced; move it, or set another run_dir")


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"]) or "the whole file"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(detail['loc'])}"
    if detail["type"] == "missing":
        return f"{key} is required"
    if detail["type"] == "value_error":  # from a section's own check; the input is the whole section
        return f"{key}: {detail['ctx']['error']}"
    return f"{key}={detail['input']!r}: {detail['msg']}"


def _nearest(location: tuple[str | int, ...]) -> str:
    """A hint naming the closest legal key of the same section, else any key of that very name."""
    *parents, unknown = (str(part) for part in location)
    known = [key.split(".") for key in _all_keys(Config)]
    same_section = [key[-1] for key in known if key[:-1] == parents]
    nearest = [[*parents, name] for name in difflib.get_close_matches(unknown, same_section, n=1)]
    nearest = nearest or [key for key in known if key[-1] == unknown]
    if nearest:
        return f"; did you mean {' or '.join('.'.join(key) for key in nearest)}?"
    return f"; legal here: {', '.join(same_section)}"


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys
