"""Work spread over processes: in order, bounded, and a killed process is told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.triplets.build import Workers

_offset = 0


def initialise(offset: int) -> None:
    global _offset
    _offset = offset


def work(item: int) -> int:
    time.sleep(0.002 * (item % 3))
    if item < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 99:
        raise ValueError("item 99 is wrong")
    return item + _offset


@pytest.mark.parametrize("num_proc", [1, 2])
def test_results_come_in_order(num_proc) -> None:
    with Workers(num_proc, initialise, (1000,)) as workers:
        assert list(workers.map(work, range(40))) == list(range(1000, 1040))
        assert list(workers.map(work, [])) == []
        with pytest.raises(UserError, match="item 99 is wrong"):
            list(workers.map(work, range(98, 102)))


def test_items_are_taken_as_results_are_and_not_all_at_once() -> None:
    taken = []
    with Workers(2, initialise, (0,)) as workers:
        results = workers.map(work, (taken.append(item) or item for item in range(1, 60)))
        next(results)
        assert len(taken) <= 8
        assert len(list(results)) == 58


PROGRAM = """
import time
from tests.triplets.test_workers import Workers, initialise, work
if __name__ == "__main__":
    with Workers(2, initialise, (0,)) as workers:
        list(workers.map(work, range(9)))
        print("ready", flush=True)
        time.sleep(60)
"""


def test_processes_end_with_a_killed_caller(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    caller = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env=environment)
    assert caller.stdout.readline() == "ready\n"
    children = psutil.Process(caller.pid).children(recursive=True)
    caller.kill()
    caller.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    caller.stdout.close()
    assert len(children) >= 2 and alive == []


def test_a_killed_process_is_a_mistake_the_user_can_act_on() -> None:
    with Workers(2, initialise, (0,)) as workers, pytest.raises(UserError, match="lower --num-proc"):
        list(workers.map(work, [1, -1, 2]))
