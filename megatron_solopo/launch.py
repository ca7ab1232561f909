"""A torchrun that exits with the code of its ranks.

Usage: `python -m megatron_solopo.launch [torchrun's options] -m megatron_solopo train ...`.

torchrun (2.13) and this launcher differ:

    event                 torchrun                                        this launcher
    SIGTERM, SIGINT       passes it on, kills the ranks after 30 s        passes it on and waits for the ranks
                          (--shutdown-timeout), exits 1 with a traceback  (only `kill -9` and SLURM's KillWait end them)
    SIGUSR1               dies of it (138) and leaves the ranks alone,    passes it on and waits
                          unless --signals-to-handle names it
    ranks exit with 85    reports a failure and exits 1; with             exits 85 and never restarts
                          --max-restarts it starts them again
    a rank fails          exits 1                                         exits with its code, or 128 + n for signal n,
                                                                          and a line names the rank and the signal
    ranks exit with 2     puts a report of failed ranks behind the line   exits 2 and adds nothing
                          that names the mistake
    the endpoint's node   exits 1 with a traceback                        exits 1 with one line
    is gone
    ranks restart         use a store that still holds the addresses of   use a new store
    (--max-restarts)      the dead ranks, and fail to connect
                          (github.com/pytorch/pytorch/issues/135712)
"""

import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from megatron_solopo import exits

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_asked: list[int] = []
"""The signals that asked this launcher to stop."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the ranks as torchrun does, and exit with their code. `arguments` are torchrun's; None: from sys.argv."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options: Any = run.parse_args(given)  # type: ignore[no-untyped-call]
    options.signals_to_handle = "SIGHUP,SIGQUIT"  # this module handles the others
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    for number in _FORWARDED:
        signal.signal(number, _forward)
    launcher: Any = api
    launcher.LocalElasticAgent = _Agent
    try:
        run.run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = _root_cause(error.failures)
        if failure.exitcode not in (exits.STOPPED, exits.MISTAKE):  # a rank has told a mistake in one line
            sys.stderr.write(f"{error}\n")
        if failure.exitcode < 0:
            sys.stderr.write(f"error: {_describe_death(rank, failure)}\n")
        sys.exit(failure.exitcode if failure.exitcode >= 0 else exits.of_signal(-failure.exitcode))
    except RendezvousError as error:
        # The launcher that holds the endpoint has ended, or its node has.
        sys.exit(f"error: lost the other launchers at {options.rdzv_endpoint}: {error}")


def _root_cause(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The rank that failed first, and its failure.

    In the same second, other ranks fail because they lost that one, or stop because this launcher ends them. So a rank
    that a signal of somebody else has ended is the cause, or else one with an exit code of its own. Where this launcher
    was asked to stop, ranks that have stopped are not to blame.
    """
    first = min(failures.values(), key=lambda failure: failure.timestamp).timestamp
    together = {rank: failure for rank, failure in failures.items() if failure.timestamp <= first + 1}
    return min(together.items(), key=lambda item: (_innocence(item[1].exitcode), item[1].timestamp))


def _innocence(exitcode: int) -> int:
    if exitcode == exits.STOPPED:
        return -1 if _asked else 2
    if -exitcode in _FORWARDED or exitcode in map(exits.of_signal, _FORWARDED):
        return 2
    return 0 if exitcode < 0 else 1


def _describe_death(rank: int, failure: Any) -> str:
    """One line about a rank that a signal has ended."""
    number = -failure.exitcode
    place = f"rank {rank} ({socket.gethostname()}, pid {failure.pid})"
    line = f"{place} was ended by signal {number} ({failure.signal_name()})"
    if number == signal.SIGKILL:
        line += (
            ". Most likely the host or the job ran out of memory, and the kernel's out-of-memory killer ended it (see "
            "`dmesg -T | grep -i oom`); or somebody sent kill -9. If it was memory: ask for more host memory, or run "
            "fewer ranks per host"
        )
    return f"{line}. Other ranks fail after it. The same command continues from the newest checkpoint"


class _Agent(LocalElasticAgent):
    """Does not restart ranks that stopped because a signal asked them to."""

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if result.failures and _root_cause(result.failures)[1].exitcode == exits.STOPPED:
            self._remaining_restarts = 0
        return result


def _forward(number: int, frame: object) -> None:
    """Pass the signal on to the ranks. They decide together, and this process waits for them."""
    _asked.append(number)
    ranks = [process for process in psutil.Process().children() if "RANK" in _environment(process)]
    for process in ranks:
        os.kill(process.pid, number)
    if not ranks:
        sys.exit(exits.STOPPED)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


if __name__ == "__main__":
    main()
