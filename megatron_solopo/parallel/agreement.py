"""Work that may fail on one rank and must then fail on all of them, so that no rank waits for one that has gone.

A user's mistake (`UserError`) and an error of the operating system (`OSError`) become the same one-line `UserError` on
every rank; it is an `OutOfSpaceError` if full file systems are all that failed. Any other exception is a fault. It
continues, with its type and its traceback, on the rank where it happened, and every other rank raises
`RankFailedError`, which names that rank.

What a rank sends and receives does not grow with the number of ranks. A list with an entry of every rank on every rank
would grow with its square over all of them.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_solopo.errors import OutOfSpaceError, UserError, describe_os_error, is_out_of_space

_Result = TypeVar("_Result")


class RankFailedError(RuntimeError):
    """Another rank failed with an exception that is no user's mistake."""


@dataclass(frozen=True)
class _Failure:
    """What the other ranks are told about an exception; exceptions themselves cannot always be pickled."""

    rank: int
    message: str
    is_fault: bool
    is_out_of_space: bool = False


def on_every_rank(action: Callable[[], _Result]) -> _Result:
    """Run `action` on every rank and return this rank's result.

    All ranks must call this function together; `action` itself must not communicate. If it fails on any rank, every
    rank raises as the module describes. A fault comes first, a full file system last, then the lowest rank counts.
    """
    result, error = _attempt(action)
    _raise_agreed(_first_failure(_failure(error)), error)
    return result  # type: ignore[return-value]


def on_rank_0(action: Callable[[], _Result]) -> _Result:
    """Run `action` on rank 0 alone and return its result on every rank; if it fails, every rank raises.

    Ranks may see a shared file system differently, so one rank looks for all of them. All ranks must call this
    function together.
    """
    result, error = _attempt_on_rank_0(action)
    found, failure = from_rank(0, (result, _failure(error)))
    _raise_agreed(failure, error)
    return found  # type: ignore[no-any-return]


def from_rank(source: int, value: Any) -> Any:
    """Return on every rank what rank `source` has. All ranks call this function together; it must not fail on one."""
    shared = [value]
    dist.broadcast_object_list(shared, src=source)
    return shared[0]


def over_ranks(operation: Any, *values: int) -> list[int]:
    """Reduce whole numbers of all ranks of the world. All ranks call this function together."""
    device = torch.cuda.current_device() if dist.get_backend() == dist.Backend.NCCL else "cpu"
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=operation)
    return [int(value) for value in tensor.tolist()]


def _attempt(action: Callable[[], _Result]) -> tuple[_Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # the caller raises it, or what stands for it, once every rank knows of it
        return None, error


def _attempt_on_rank_0(action: Callable[[], _Result]) -> tuple[_Result | None, Exception | None]:
    return _attempt(action) if dist.get_rank() == 0 else (None, None)


def _failure(error: Exception | None) -> _Failure | None:
    if error is None:
        return None
    if isinstance(error, UserError):
        return _Failure(dist.get_rank(), str(error), is_fault=False, is_out_of_space=is_out_of_space(error))
    if isinstance(error, OSError):
        message = describe_os_error(error)
        return _Failure(dist.get_rank(), message, is_fault=False, is_out_of_space=is_out_of_space(error))
    return _Failure(dist.get_rank(), f"{type(error).__name__}: {' '.join(str(error).split())}", is_fault=True)


def _first_failure(own: _Failure | None) -> _Failure | None:
    """Of all ranks' failures the one to report: a fault first, a full file system last, then the lowest rank's."""
    rank, nobody = dist.get_rank(), dist.get_world_size()
    by_gravity = over_ranks(
        dist.ReduceOp.MIN,
        rank if own is not None and own.is_fault else nobody,
        rank if own is not None and not own.is_out_of_space else nobody,
        rank if own is not None else nobody,
    )
    source = next((each for each in by_gravity if each != nobody), None)
    if source is None:
        return None
    first: _Failure = from_rank(source, own)
    return first


def _raise_agreed(first: _Failure | None, own_error: Exception | None) -> None:
    if first is None:
        return
    own = _failure(own_error)
    if own is not None and own.is_fault:
        assert own_error is not None
        raise own_error
    if first.is_fault:
        raise RankFailedError(
            f"rank {first.rank} failed: {first.message}; its traceback is in that rank's output"
        ) from own_error
    raise (OutOfSpaceError if first.is_out_of_space else UserError)(first.message) from None


def least_loaded(sizes: Sequence[int], ranks: int) -> list[int]:
    """Give each of several things to a rank, the largest first, always to the rank with the least so far.

    Ranks that call it with equal sizes make the same choice without asking each other.
    """
    loads, chosen = [(0, rank) for rank in range(ranks)], [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        load, chosen[number] = loads[0]
        heapq.heapreplace(loads, (load + sizes[number], chosen[number]))
    return chosen
