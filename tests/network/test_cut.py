"""Two ranks on two hosts, and the network between them goes: both end and name who is missing, and the run goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.network.hosts import NEEDS_NAMESPACES, Network, two_hosts
from tests.slurm.cluster import wait_until
from tests.slurm.runs import computed, steps_done, write_config

pytestmark = [NEEDS_NAMESPACES, pytest.mark.timeout(600)]

STEPS = 40
LIMIT_MINUTES = 0.25
"""Of the watchdog: 15 seconds without progress within a step."""


def start(network: Network, folder: Path, name: str, *overrides: str) -> list[subprocess.Popen[bytes]]:
    """One launcher and one rank on each host, as on two nodes of a cluster; host n logs to `<name>-<n>.log`."""
    first = network.hosts[0].address
    # Hosts that share a name cannot tell by themselves which of them an address belongs to.
    command = [sys.executable, "-m", "megatron_solopo.launch", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:29500", "--rdzv-id", name]
    train = ["-m", "megatron_solopo", "train", "--config", str(folder / "config.yaml"), f"run_dir={folder / name}"]
    train += overrides
    return [
        host.start(
            [*command, "--rdzv-conf", f"is_host={1 - number}", "--local-addr", host.address, *train],
            folder / f"{name}-{number}.log",
            PYTHONUNBUFFERED="1",
        )
        for number, host in enumerate(network.hosts)
    ]


def end(launchers: list[subprocess.Popen[bytes]], timeout: float) -> list[int]:
    """Their exit codes."""
    return [launcher.wait(timeout=timeout) for launcher in launchers]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run, one that is cut, and its continuation."""
    folder = tmp_path_factory.mktemp("network")
    write_config(folder, max_steps=STEPS, save_steps=20)
    with two_hosts() as network:
        whole = end(start(network, folder, "whole"), 200)
        launchers = start(network, folder, "cut", f"watchdog.timeout_minutes={LIMIT_MINUTES}")
        wait_until(lambda: steps_done(folder / "cut") >= 22, 200, "step 22")
        network.cut()
        cut_at = time.monotonic()
        codes = end(launchers, 200)
        seconds = time.monotonic() - cut_at
        logs = [(folder / f"cut-{number}.log").read_text() for number in range(2)]
        network.repair()
        again = end(start(network, folder, "cut"), 200)
    return {"folder": folder, "whole": whole, "codes": codes, "seconds": seconds, "logs": logs, "again": again}


def test_both_sides_end_in_time_and_name_the_missing_rank(story: dict[str, Any]) -> None:
    assert story["whole"] == [0, 0]
    assert 0 not in story["codes"] and -signal.SIGKILL not in story["codes"], story["codes"]
    assert story["seconds"] < 60 * LIMIT_MINUTES + 60, story["seconds"]
    for rank, log in enumerate(story["logs"]):
        told = [line for line in log.splitlines() if line.startswith("hung:") and f"rank {1 - rank}" in line]
        assert told, f"rank {rank} does not name rank {1 - rank}:\n{log}"


def test_the_run_goes_on_and_ends_the_same(story: dict[str, Any]) -> None:
    assert story["again"] == [0, 0]
    assert computed(story["folder"] / "cut") == computed(story["folder"] / "whole")
