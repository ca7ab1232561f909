"""One run per directory, and no lock that outlives its process."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from megatron_solopo.train import lock
from megatron_solopo.train.lock import run_lock
from tests.ranks import layout


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with layout(), mock.patch.object(lock, "_WAIT_SECONDS", 0.5):
        yield


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock, and has a child that lives on."""
    code = textwrap.dedent(f"""
        import os, time
        from pathlib import Path
        from megatron_solopo.train.lock import run_lock
        from tests.ranks import layout
        with layout(), run_lock(Path({str(tmp_path)!r})):
            child = os.fork()
            if child:
                print(child, flush=True)
            time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process
    for pid in (process.pid, child):
        os.kill(pid, signal.SIGKILL) if process.poll() is None or pid == child else None
    process.wait()


def test_a_second_run_is_told_who_runs_and_kill_9_frees_the_directory(tmp_path: Path, holder) -> None:
    with pytest.raises(ValueError) as error, run_lock(tmp_path):
        pytest.fail("was locked twice")
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: process {holder.pid} on {os.uname().nodename} (1 ranks) trains in it")
    assert "\n" not in message
    holder.kill()
    holder.wait()
    with run_lock(tmp_path):  # though its child lives
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    with run_lock(tmp_path):
        pass
