"""Work on several processes: results in order, bounded memory, and errors with their types."""

import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.process_pool import ProcessPool

_offset = 0


def initialise(offset: int) -> None:
    global _offset
    if offset < 0:
        raise KeyError("no such offset")
    _offset = offset


def work(item: int) -> int:
    time.sleep(0.002 * (item % 3))
    if item < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 99:
        raise ValueError("a fault of ours")
    if item == 98:
        raise UserError("item 98: write it again")
    return item + _offset


@pytest.mark.parametrize("num_proc", [1, 2])
def test_results_come_in_order(num_proc) -> None:
    with ProcessPool(num_proc, initialise, (1000,)) as pool:
        assert list(pool.map(work, range(40))) == list(range(1000, 1040))
        assert list(pool.map(work, [])) == []


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_keeps_its_type(num_proc) -> None:
    with ProcessPool(num_proc, initialise, (0,)) as pool:
        with pytest.raises(UserError, match=r"^item 98: write it again$"):
            list(pool.map(work, [98, 1]))
        with pytest.raises(ValueError, match="a fault of ours") as error:
            list(pool.map(work, [99, 1]))
    assert error.type is ValueError
    shown = "".join(traceback.format_exception(error.value))
    assert "in work\n" in shown and 'raise ValueError("a fault of ours")' in shown


def test_an_error_of_the_set_up_keeps_its_type() -> None:
    with ProcessPool(2, initialise, (-1,)) as pool, pytest.raises(KeyError, match="no such offset"):
        list(pool.map(work, [1, 2]))


def test_items_are_taken_as_results_are_and_not_all_at_once() -> None:
    taken = []
    with ProcessPool(2, initialise, (0,)) as pool:
        results = pool.map(work, (taken.append(item) or item for item in range(1, 60)))
        next(results)
        assert len(taken) <= 8
        assert len(list(results)) == 58


PROGRAM = """
import time
from tests.test_process_pool import ProcessPool, initialise, work
if __name__ == "__main__":
    with ProcessPool(2, initialise, (0,)) as pool:
        list(pool.map(work, range(9)))
        print("ready", flush=True)
        time.sleep(60)
"""


def test_processes_end_with_a_killed_caller(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
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
    with ProcessPool(2, initialise, (0,)) as pool, pytest.raises(UserError, match="lower --num-proc"):
        list(pool.map(work, [1, -1, 2]))
