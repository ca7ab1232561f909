"""A SLURM controller without nodes to run on, which judges batch scripts: `sbatch --test-only`."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.plan.models import ROOT
from tests.slurm.conf import COMMON

CONTROLLER = shutil.which("slurmctld") or shutil.which("slurmctld", path="/usr/sbin")
NODES = 128
_CONF = (
    COMMON
    + """\
ClusterName=plans
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
GresTypes=gpu
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=600
NodeName=node[001-{nodes}] CPUs=64 RealMemory=4000 Gres=gpu:8 State=CLOUD
PartitionName=main Nodes=node[001-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""
)


@contextmanager
def controller(folder: Path) -> Iterator[dict[str, str]]:
    """128 nodes of 8 GPUs that SLURM believes it could start; yields the environment of its commands."""
    assert CONTROLLER is not None
    (folder / "state").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    values = {"host": socket.gethostname().split(".")[0], "port": port, "user": user, "folder": folder, "nodes": NODES}
    (folder / "slurm.conf").write_text(_CONF.format(**values), encoding="utf-8")
    for number in range(8):
        (folder / f"nvidia{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-7]\n", encoding="utf-8")
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    process = subprocess.Popen([CONTROLLER, "-c", "-D"], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(["sinfo"], env=environment, capture_output=True).returncode:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield environment
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def judge(script: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Ask whether and when a script could run."""
    return subprocess.run(
        ["sbatch", "--test-only", str(script)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
