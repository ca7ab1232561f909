"""The errors that a user can mend, and how they are worded."""

import errno
import json
from typing import Any

from pydantic import ValidationError

_LONGEST_VALUE = 80


class UserError(ValueError):
    """A mistake that the user can mend: one line with what, where, the legal values and the key to change.

    The command line prints the line alone and ends with exit code 2. Every other exception keeps its traceback.
    """


class OutOfSpaceError(UserError):
    """A file system has no room for a file, or a quota is used up."""


def is_out_of_space(error: Exception) -> bool:
    """Whether a file system refused a write because it, or a quota, is full."""
    return isinstance(error, OutOfSpaceError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    )


def describe_problem(detail: Any, whole: str) -> str:
    """One line for one item of pydantic's `ValidationError.errors()`, such as "optimizer.lr=0: Input should be ...".

    Args:
        whole: what to name instead of a field if the whole input is wrong.

    Raises:
        ValueError: the validator's own exception, if it is not a `UserError`; it is then a bug.
    """
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "missing":
        return f"{key} is required"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if detail["type"] == "value_error":  # raised by a validator of our own
        cause = detail["ctx"]["error"]
        if not isinstance(cause, UserError):
            raise cause
        return f"{key or whole}: {cause}"
    value = f"={_shown(detail['input'])}"
    # A long value would hide the reason, and a file that is no JSON would be shown whole.
    shown = value if key and len(value) <= _LONGEST_VALUE else ""
    reason = "Input should be a path" if detail["type"] == "path_type" else detail["msg"]
    return f"{key or whole}{shown}: {reason}"


def _shown(value: object) -> str:
    """As Python shows it, but null, true and false as YAML and JSON write them."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def first_problem(error: ValidationError, whole: str) -> str:
    """`describe_problem` of the first field that does not fit."""
    return describe_problem(error.errors(include_url=False)[0], whole)


def describe_os_error(error: OSError) -> str:
    """One line: the file, if the error names one, and the reason."""
    reason = error.strerror or f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{error.filename}: {reason}" if error.filename else reason
