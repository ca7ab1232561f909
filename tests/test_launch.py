"""The launcher ends as its ranks did, whatever it was told itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_solopo import exits
from megatron_solopo import launch as launcher

# A rank that ends with 85 when it is asked to stop, and with the code that it was given otherwise.
RANK = """
import os, pathlib, signal, sys, time
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(number))
folder, life = pathlib.Path(sys.argv[1]), os.environ["TORCHELASTIC_RESTART_COUNT"]
(folder / f"{os.environ['RANK']}-{life}").touch()
while not asked and len(list(folder.glob(f"*-{life}"))) < 2:
    time.sleep(0.02)  # else one may have failed before the other began
until = time.monotonic() + float(sys.argv[2])
while not asked and time.monotonic() < until:
    time.sleep(0.05)
sys.exit(85 if asked else int(sys.argv[3]))
"""

# Two ranks that meet over gloo; in its first life, one dies of it.
MEETING_RANK = """
import datetime, os, pathlib, signal, sys, time
import torch, torch.distributed as dist
time.sleep(2 * int(os.environ["RANK"] == "0"))  # the other one looks first: it must find nothing old
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
dist.all_reduce(torch.ones(1))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
pathlib.Path(sys.argv[1], f"met-{os.environ['RANK']}").touch()
dist.destroy_process_group()
"""


def launch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    (folder / "started").mkdir()
    command = [sys.executable, "-m", "megatron_solopo.launch", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "--max-restarts", "1", str(folder / "rank.py"), str(folder / "started"), *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def started(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "started").glob("*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_reaches_the_ranks_and_their_code_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    launcher = launch(tmp_path, "60", "0")
    while len(started(tmp_path)) < 2 and launcher.poll() is None:
        time.sleep(0.05)
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == exits.STOPPED
    assert started(tmp_path) == ["0-0", "1-0"], "they are not started again"
    assert "Traceback" not in errors and "FAILED" not in errors


def test_a_failure_is_started_again_and_its_code_comes_back(tmp_path: Path) -> None:
    launcher = launch(tmp_path, "0.1", "7")
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 7
    assert started(tmp_path) == ["0-0", "0-1", "1-0", "1-1"]
    assert "rank.py FAILED" in errors, errors


def test_a_mistake_is_told_by_the_ranks_alone(tmp_path: Path) -> None:
    launcher = launch(tmp_path, "0.1", "2")
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == exits.MISTAKE
    assert "rank.py FAILED" not in errors, errors


def test_ranks_that_start_again_meet_each_other_not_the_dead(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(MEETING_RANK)
    command = [sys.executable, "-m", "megatron_solopo.launch", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(tmp_path / "rank.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("met-*")) == ["met-0", "met-1"]


# Rank 1 is killed like by the out-of-memory killer. Rank 0 notices, and fails by itself before the launcher looks.
KILLED_RANK = """
import os, pathlib, signal, sys, time
own, other = (pathlib.Path(sys.argv[1], name) for name in (os.environ["RANK"], str(1 - int(os.environ["RANK"]))))
own.write_text(str(os.getpid()))
while not (other.is_file() and other.read_text()):
    time.sleep(0.02)
if os.environ["RANK"] == "1":
    signal.pause()
os.kill(int(other.read_text()), signal.SIGKILL)
os._exit(1)
"""


def test_a_killed_rank_is_named_with_its_signal_and_the_likely_cause(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(KILLED_RANK)
    command = [sys.executable, "-m", "megatron_solopo.launch", "--standalone", "--nproc-per-node", "2"]
    command += ["--monitor-interval", "1", str(tmp_path / "rank.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240)
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    pid = (tmp_path / "1").read_text()
    assert last.startswith("error: rank 1 (") and f"pid {pid}) was ended by signal 9 (SIGKILL)" in last
    assert "out-of-memory killer" in last and "continues from the newest checkpoint" in last


def failed(exitcode: int, timestamp: int) -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp)


def test_the_cause_is_the_death_and_not_those_who_noticed_it_or_were_ended_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died = failed(-11, 11)
    assert launcher._root_cause({0: failed(1, 10), 1: died, 2: failed(-15, 10)}) == (1, died)
    first = failed(2, 10)
    own = failed(7, 10)
    assert launcher._root_cause({0: failed(85, 10), 1: own}) == (1, own), "rank 0 stopped since the launcher ended it"
    assert launcher._root_cause({0: failed(143, 10), 1: own}) == (1, own)
    ended_by_the_launcher = failed(-9, 40)
    assert launcher._root_cause({0: ended_by_the_launcher, 1: first, 2: failed(-15, 10)}) == (1, first)
    monkeypatch.setattr(launcher, "_asked", [signal.SIGTERM])
    stopped = failed(85, 10)
    assert launcher._root_cause({0: failed(-6, 10), 1: stopped}) == (1, stopped), "it was asked to stop, and has saved"
