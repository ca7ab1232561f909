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

from megatron_solopo.errors import UserError
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


def test_a_job_that_slurm_started_again_does_not_wait_for_its_dead_self(tmp_path: Path, monkeypatch) -> None:
    """A dead node's lock on NFS outlives it."""
    code = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from megatron_solopo.train.lock import run_lock
        from tests.ranks import layout
        with layout(), run_lock(Path({str(tmp_path)!r})):
            print("held", flush=True)
            time.sleep(60)
    """)

    def start(job: str, restarts: str | None) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        if restarts is not None:
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)

    start("77", None)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        for job, restarts in (("77", None), ("7", "1"), ("78", "1")):  # the same start, and other jobs
            start(job, restarts)
            with pytest.raises(UserError, match="SLURM job 77 after 0 restarts"), run_lock(tmp_path):
                pytest.fail("was locked twice")
        start("77", "2")
        with run_lock(tmp_path):
            assert "SLURM job 77 after 2 restarts" in (tmp_path / ".lock").read_text()
    finally:
        process.kill()
        process.communicate()


def test_a_run_that_wrote_nothing_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), run_lock(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    with run_lock(tmp_path / "new"):
        (tmp_path / "new" / "metrics.jsonl").touch()
    with run_lock(tmp_path / "new"):
        pass
    assert (tmp_path / "new" / ".lock").exists()


def test_a_second_run_is_told_who_runs_and_kill_9_frees_the_directory(tmp_path: Path, holder) -> None:
    with pytest.raises(UserError) as error, run_lock(tmp_path):
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
