"""What is wrong with data that does not fit its schema, in the words of one line."""

from pydantic import ValidationError


def first_problem(error: ValidationError, whole: str) -> str:
    """The first field that does not fit, by its path, and why: "cells.3.low: Field required".

    Args:
        whole: what to name instead of a field where it is all of the input.
    """
    detail = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, detail['loc'])) or whole}: {detail['msg']}"
