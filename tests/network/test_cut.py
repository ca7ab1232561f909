"""Two ranks on two hosts, and the network between them goes: both end and name who is missing, and the run goes on."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_solopo import exits
from tests.network.hosts import NEEDS_NAMESPACES, Network, two_hosts
from tests.slurm.cluster import wait_until
from tests.slurm.runs import steps_done, write_config
from tests.train.runs import recorded

# In short: a rank that stops (tests/train/test_watchdog.py).
pytestmark = [NEEDS_NAMESPACES, pytest.mark.long, pytest.mark.timeout(600)]

STEPS = 24
LIMIT_MINUTES = 0.25
"""Of the watchdog: 15 seconds without progress within a step."""


def start(network: Network, folder: Path, name: str, *overrides: str) -> list[subprocess.Popen[bytes]]:
    """One rank on each host; rank n logs to `<name>-<n>.log`."""
    command = [sys.executable, "-m", "megatron_solopo", "train", "--config", str(folder / "config.yaml")]
    command += [f"run_dir={folder / name}", *overrides]
    meeting = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": network.hosts[0].address, "MASTER_PORT": "29500"}
    return [
        host.start(command, folder / f"{name}-{rank}.log", RANK=str(rank), **meeting)
        for rank, host in enumerate(network.hosts)
    ]


def end(ranks: list[subprocess.Popen[bytes]], timeout: float) -> list[int]:
    """Their exit codes."""
    return [rank.wait(timeout=timeout) for rank in ranks]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run, one that is cut, and its continuation."""
    folder = tmp_path_factory.mktemp("network")
    write_config(folder, max_steps=STEPS, save_steps=10)
    with two_hosts() as network:
        whole = end(start(network, folder, "whole"), 200)
        ranks = start(network, folder, "cut", f"watchdog.timeout_minutes={LIMIT_MINUTES}")
        wait_until(lambda: steps_done(folder / "cut") >= 12, 200, "step 12")
        network.cut()
        cut_at = time.monotonic()
        codes = end(ranks, 200)
        seconds = time.monotonic() - cut_at
        logs = [(folder / f"cut-{number}.log").read_text() for number in range(2)]
        network.repair()
        again = end(start(network, folder, "cut"), 200)
    return {"folder": folder, "whole": whole, "codes": codes, "seconds": seconds, "logs": logs, "again": again}


def test_both_sides_end_in_time_and_name_the_missing_rank(story: dict[str, Any]) -> None:
    assert story["whole"] == [0, 0]
    assert story["codes"] == [exits.HUNG, exits.HUNG]
    assert story["seconds"] < 60 * LIMIT_MINUTES + 60, story["seconds"]
    for rank, log in enumerate(story["logs"]):
        told = [line for line in log.splitlines() if line.startswith("hung:") and f"rank {1 - rank}" in line]
        assert told, f"rank {rank} does not name rank {1 - rank}:\n{log}"


def test_the_run_goes_on_and_ends_the_same(story: dict[str, Any]) -> None:
    assert story["again"] == [0, 0]
    assert recorded(story["folder"], "cut") == recorded(story["folder"], "whole")
