"""Errors that the ranks agree on: what each of two ranks raises when one of them fails."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_solopo.errors import UserError
from megatron_solopo.parallel.agreement import on_every_rank, on_rank_0
from tests.ranks import two_ranks


def user_error() -> None:
    raise UserError("optimizer.lr=-1 must be positive; set optimizer.lr")


def missing_file() -> None:
    Path("/nowhere/at/all").read_bytes()


def full_disk() -> None:
    with Path("/dev/full").open("w") as stream:
        stream.write("x")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")


def key_error() -> None:
    {}["absent"]


def unequal_lengths() -> None:
    list(zip([1], [1, 2], strict=True))


FAULTS = {"out of memory": out_of_memory, "KeyError": key_error, "zip": unequal_lengths}
ACTIONS = {"user": user_error, "file": missing_file, **FAULTS}


def raised(run: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": run()}
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}


def on_two_ranks() -> dict[str, Any]:
    rank = dist.get_rank()
    found = {
        name: {
            "on every rank": raised(lambda action=action: on_every_rank(action if rank == 1 else lambda: rank)),
            "on rank 0": raised(lambda action=action: on_rank_0(action)),
        }
        for name, action in ACTIONS.items()
    }
    found["results"] = {"every": on_every_rank(lambda: rank), "rank 0": on_rank_0(lambda: f"of rank {rank}")}
    found["full disk"] = {
        "on every rank": raised(lambda: on_every_rank(full_disk if rank == 1 else lambda: rank)),
        "on rank 0": raised(lambda: on_rank_0(full_disk)),
        "and a missing file": raised(lambda: on_every_rank(missing_file if rank == 1 else full_disk)),
    }
    found["both"] = raised(lambda: on_every_rank(key_error if rank == 1 else user_error))
    return found


def test_results_are_returned() -> None:
    assert [rank["results"] for rank in two_ranks(__name__)] == [
        {"every": 0, "rank 0": "of rank 0"},
        {"every": 1, "rank 0": "of rank 0"},
    ]


def test_a_full_disk_is_known_as_one_on_all_ranks_unless_something_else_failed_too() -> None:
    for rank in two_ranks(__name__):
        found = rank["full disk"]
        for way in ("on every rank", "on rank 0"):
            assert (found[way]["type"], found[way]["message"]) == ("OutOfSpaceError", "No space left on device")
        assert found["and a missing file"]["type"] == "UserError"
        assert found["and a missing file"]["message"].startswith("/nowhere/at/all: ")


@pytest.mark.parametrize("way", ["on every rank", "on rank 0"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("user", "optimizer.lr=-1 must be positive; set optimizer.lr"),
     ("file", "/nowhere/at/all: No such file or directory")],
)  # fmt: skip
def test_a_users_mistake_is_the_same_line_on_all_ranks(name: str, message: str, way: str) -> None:
    for rank in two_ranks(__name__):
        assert (rank[name][way]["type"], rank[name][way]["message"]) == ("UserError", message)


@pytest.mark.parametrize("way", ["on every rank", "on rank 0"])
@pytest.mark.parametrize(
    ("name", "type_name"), [("out of memory", "OutOfMemoryError"), ("KeyError", "KeyError"), ("zip", "ValueError")]
)
def test_a_fault_keeps_its_traceback_and_the_other_rank_names_it(name: str, type_name: str, way: str) -> None:
    failed = 1 if way == "on every rank" else 0
    ranks = two_ranks(__name__)
    own, other = ranks[failed][name][way], ranks[1 - failed][name][way]
    assert own["type"] == type_name and f"in {FAULTS[name].__name__}\n" in own["traceback"]
    assert other["type"] == "RankFailedError" and "\n" not in other["message"]
    assert other["message"].startswith(f"rank {failed} failed: {type_name}: ")
    assert other["message"].endswith("; its traceback is in that rank's output")


def test_a_fault_comes_before_a_users_mistake() -> None:
    first, second = (rank["both"] for rank in two_ranks(__name__))
    assert second["type"] == "KeyError"
    assert first["message"].startswith("rank 1 failed: KeyError") and "optimizer.lr=-1" in first["traceback"]
