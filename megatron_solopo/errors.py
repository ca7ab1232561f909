"""What a user can mend, told apart from what is a fault of this program."""

from pydantic import ValidationError


class UserError(ValueError):
    """A mistake that the user can mend: one line with what, where, the legal values and the key to change.

    The command line prints the line alone and ends with exit code 2. Every other exception keeps its traceback.
    """


def first_problem(error: ValidationError, whole: str) -> str:
    """The first field that does not fit, by its path, and why: "cells.3.low: Field required".

    Args:
        whole: what to name instead of a field where it is all of the input.
    """
    detail = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, detail['loc'])) or whole}: {detail['msg']}"
