"""torchrun that ends as its ranks did: `python -m megatron_solopo.launch [options] -m megatron_solopo train ...`.

What plain torchrun (2.13) does, and this launcher instead:

    what happens          torchrun                                        here
    SIGTERM, SIGINT       passes it on, kills the ranks after 30 s        passes it on and waits for the ranks
                          (--shutdown-timeout), exits 1 with a traceback  (`kill -9` remains, and SLURM's KillWait)
    SIGUSR1               dies of it (138); the ranks are left alone      passes it on and waits
                          unless --signals-to-handle names it
    ranks end with 85     reports a failure and exits 1; with             exits 85, never restarts
                          --max-restarts it starts them again
    a rank fails          exits 1                                         exits with its code, 128 + n for signal n
    the node of the       exits 1 with a traceback                        exits 1 with one line
    endpoint is gone
    ranks start again     in a store that still holds the addresses of    in a store of their own
    (--max-restarts)      the dead ones: "connection refused"
                          (github.com/pytorch/pytorch/issues/135712)
"""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import psutil
from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from megatron_solopo import exits

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the ranks as torchrun does and exit as they did; with `arguments` of torchrun, or the command line's."""
    options: Any = run.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    options.signals_to_handle = "SIGHUP,SIGQUIT"  # the others are handled here
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    for number in _FORWARDED:
        signal.signal(number, _forward)
    launcher: Any = api
    launcher.LocalElasticAgent = _Agent
    try:
        run.run(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != exits.STOPPED:
            sys.stderr.write(f"{error}\n")
        sys.exit(failure.exitcode if failure.exitcode >= 0 else exits.of_signal(-failure.exitcode))
    except RendezvousError as error:
        # The launcher that the others met at has ended, or its node has.
        sys.exit(f"error: the launchers have lost each other at {options.rdzv_endpoint}: {error}")


class _Agent(LocalElasticAgent):
    """Takes ranks that were asked to stop for what they are: no failure to start again from."""

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode == exits.STOPPED for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def _forward(number: int, frame: object) -> None:
    """Tell the ranks; they decide together, and this process follows them."""
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
