"""Runs a function on N gloo ranks: real processes, real collectives."""

import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

TIMEOUT_SECONDS = 280  # below pytest's own, so that the missing ranks are named

# The server imports what ranks need once; every rank is then a fork of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on every rank of a gloo world and return the results in rank order.

    The function and its arguments must be picklable. An exception on any rank ends all of them and
    is raised here with that rank's traceback.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    results = _CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        ranks = [
            _CONTEXT.Process(
                target=_run_rank,
                args=(function, arguments, rank, world_size, store, results),
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            collected = _collect(results, ranks)
            for process in ranks:  # so that each ends what it started
                process.join(timeout=30)
            return collected
        finally:
            for process in ranks:
                process.kill()
                process.join()


def exit_codes(
    function: Callable[..., Any], world_size: int, *arguments: Any, patience: float, until: int | None = None
) -> list[int | None]:
    """Like `run_distributed`, for functions that end their process: the exit codes, None for ranks that did not end.

    A rank that was ended by signal n has the code -n. Ranks that are still there are killed after `patience` seconds,
    or once `until` ranks have ended.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    deadline = time.monotonic() + patience
    with tempfile.TemporaryDirectory() as folder:
        common = (world_size, Path(folder) / "store", _CONTEXT.Queue())
        ranks = [
            _CONTEXT.Process(target=_run_rank, args=(function, arguments, rank, *common)) for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        while time.monotonic() < deadline:
            if sum(process.exitcode is not None for process in ranks) >= (until or world_size):
                break
            time.sleep(0.1)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        return codes


def _collect(results: Any, ranks: list[Any]) -> list[Any]:
    collected: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(collected) < len(ranks):
        try:
            rank, value, failure = results.get(timeout=1)
        except queue.Empty:
            missing = sorted(set(range(len(ranks))) - set(collected))
            killed = [rank for rank in missing if ranks[rank].exitcode not in (None, 0, 1)]
            if killed or time.monotonic() > deadline:
                raise TimeoutError(f"ranks {missing} did not answer; killed: {killed}") from None
            continue
        if failure:
            raise RuntimeError(f"rank {rank} failed:\n{failure}")
        collected[rank] = pickle.loads(value)
    return [collected[rank] for rank in range(len(ranks))]


def _run_rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world_size: int, store: Path, results: Any
) -> None:
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        # A run's picture takes most of a second, and these are hundreds of runs. Runs of the command draw theirs.
        with mock.patch("megatron_solopo.train.metrics.plot_metrics"):
            value = function(*arguments)
        # Bytes, not tensors: torch would hand tensors over by a descriptor that dies with this process.
        results.put((rank, pickle.dumps(value), None))
        # Others may still be in a collective with this rank: leave together.
        dist.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
