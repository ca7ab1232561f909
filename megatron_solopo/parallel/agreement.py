"""Work that can fail on one rank and must then fail on all: with one message, and nobody left waiting."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_solopo.errors import UserError

_Result = TypeVar("_Result")


def together(action: Callable[[], _Result]) -> _Result:
    """Run `action` on every rank and return this rank's result.

    Raises UserError on every rank, with the message of the lowest rank that failed, if it failed anywhere.
    """
    result, failure = _attempt(action)
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    raise_first(failures)
    return result  # type: ignore[return-value]


def on_rank_0(action: Callable[[], _Result]) -> _Result:
    """Run `action` on rank 0 alone and return its result on every rank.

    On a shared file system the ranks might not see the same yet. Raises UserError on every rank if it failed.
    """
    found: list[Any] = list(_attempt(action)) if dist.get_rank() == 0 else [None, None]
    dist.broadcast_object_list(found, src=0)
    raise_first(found[1:])
    result: _Result = found[0]
    return result


def raise_first(failures: list[str | None]) -> None:
    """Raise ValueError with the first failure, if there is one."""
    for failure in failures:
        if failure is not None:
            raise UserError(failure)


def _attempt(action: Callable[[], _Result]) -> tuple[_Result | None, str | None]:
    try:
        return action(), None
    # Any other is a mistake of this program, and keeps its traceback.
    except (ValueError, OSError, RuntimeError) as error:
        return None, described_error(error)


def described_error(error: BaseException) -> str:
    """One line for what the file system or a library raised: the file, where the error or what caused it names one."""
    for each in (error, error.__cause__, error.__context__):
        if isinstance(each, OSError) and each.strerror:
            return f"{each.filename}: {each.strerror}" if each.filename else each.strerror
    message = " ".join(str(error).split())
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"
