"""A real SLURM on this machine: one controller and several nodes, all of them processes of the test.

Nodes are named by loopback addresses, so that whatever a batch script learns from SLURM can be connected to.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.slurm.conf import COMMON

ROOT = Path(__file__).resolve().parents[2]
PATH = f"{os.environ['PATH']}:/usr/sbin"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NEEDS_SLURM = pytest.mark.skipif(
    any(shutil.which(program, path=PATH) is None for program in PROGRAMS) or os.geteuid() != 0,
    reason="SLURM is not installed (apt-get install slurm-wlm), or this is not root",
)
_CONF = (
    COMMON
    + """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
# SLURM keeps a requeued job from starting for as long as its old credentials live: 5 seconds, not 120.
AuthInfo=cred_expire=5
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
SlurmdTimeout={node_timeout}
KillWait=5
MinJobAge=600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
)


@dataclass
class Cluster:
    """A running one; commands act on it alone."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *command: str | Path, **environment: str) -> str:
        """Output of a SLURM command, which must succeed."""
        done = subprocess.run(
            command, env=self.environment | environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str, key: str) -> str:
        """A field of `scontrol show job`: JobState, Restarts, NodeList, ExitCode, ..."""
        fields = self.run("scontrol", "show", "job", number).split()
        return next(each.removeprefix(f"{key}=") for each in fields if each.startswith(f"{key}="))

    def wait_for_end(self, number: str, timeout: float) -> str:
        """The state in which the job ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_until(lambda: self.job(number, "JobState") in ended, timeout, f"the end of job {number}")
        return self.job(number, "JobState")

    def cut_power(self, node: str) -> None:
        """SIGKILL to everything that runs on a node, its daemon included."""
        steps = [process for process in psutil.process_iter() if _is_step_of(process, self.folder, node)]
        # Those that could tell the controller what happened go first: a node that loses power tells nothing.
        doomed = [*steps, *(each for step in steps for each in step.children(recursive=True))]
        for process in (self.daemons.pop(node), *doomed):
            with suppress(psutil.NoSuchProcess):
                process.kill()
            process.wait(timeout=30)

    def restore_power(self, node: str) -> None:
        """Start a node again, and wait until it takes jobs."""
        self.daemons[node] = _start(self, "slurmd", "-N", node)
        wait_until(lambda: self.run("sinfo", "-h", "-n", node, "-o", "%t") == "idle", 60, f"{node} to be idle")


def _is_step_of(process: psutil.Process, folder: Path, node: str) -> bool:
    try:
        logs = [each.path for each in process.open_files()] if process.name() == "slurmstepd" else []
    except psutil.Error:
        return False
    return str(folder / f"slurmd.{node}.log") in logs


@contextmanager
def cluster(folder: Path, *, nodes: int, cpus: int = 2, node_timeout: int = 20) -> Iterator[Cluster]:
    """So many nodes of so many CPUs and eight pretended GPUs; everything ends with the block.

    Args:
        node_timeout: seconds without a sign of life after which SLURM calls a node dead.
    """
    for name in ("state", "dev"):
        (folder / name).mkdir(parents=True)
    host, port = socket.gethostname().split(".")[0], _free_port()
    names = [f"127.0.0.{11 + number}" for number in range(nodes)]
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr={name} Port={port + 1 + number} CPUs={cpus} RealMemory=4000 "
        "Gres=gpu:8 State=UNKNOWN"
        for number, name in enumerate(names)
    ]
    conf = _CONF.format(host=host, port=port, folder=folder, node_timeout=node_timeout)
    head, partition = conf.rsplit("PartitionName", 1)
    (folder / "slurm.conf").write_text("\n".join([head, *lines, f"PartitionName{partition}"]))
    for number in range(8):
        (folder / "dev" / f"nvidia{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-7]\n")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "RANK"))}
    running = Cluster(folder, inherited | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        running.daemons["controller"] = _start(running, "slurmctld", "-c")
        for name in names:
            running.daemons[name] = _start(running, "slurmd", "-N", name)
        idle = ("sinfo", "-h", "-N", "-t", "idle", "-o", "%N")
        wait_until(lambda: set(_output(running, *idle).split()) == set(names), 60, f"idle nodes {names}")
        yield running
    finally:
        _stop(running)


def wait_until(reached: Callable[[], object], timeout: float, what: str) -> None:
    """Poll until `reached()` is true."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.2)


def _output(running: Cluster, *command: str) -> str:
    return subprocess.run(command, env=running.environment, capture_output=True, text=True).stdout


def _start(running: Cluster, *command: str) -> subprocess.Popen[bytes]:
    # Jobs and steps become sessions of their own and outlive their node's daemon; `_stop` ends them first.
    return subprocess.Popen(
        [shutil.which(command[0], path=PATH), "-D", *command[1:]],
        env=running.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _stop(running: Cluster) -> None:
    for name in [each for each in running.daemons if each != "controller"]:
        running.cut_power(name)
    for process in running.daemons.values():
        process.terminate()
        process.wait(timeout=30)


def _free_port() -> int:
    """The first of a few free ports in a row, below those that the kernel hands out."""
    for port in range(16800 + os.getpid() % 1000 * 10, 32000, 10):
        with socket.socket() as attempt:
            try:
                attempt.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("no free port")
