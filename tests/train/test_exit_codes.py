"""A run ends with the code that it earned, and its threads end before its process groups."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_solopo import exits
from megatron_solopo.config import Config
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.megatron_internals import ShardedFiles
from megatron_solopo.train.policy import Policy
from megatron_solopo.train.saving import Saver
from megatron_solopo.train.session import Session, open_session
from megatron_solopo.train.trainer import train
from megatron_solopo.train.watchdog import RollCall
from tests.distributed import run_distributed
from tests.train.console import ROOT, exit_codes, make_inputs
from tests.train.runs import at_call, small_config
from tests.train.runs import make_inputs as make_run_inputs

# Rank 0 fails after it has begun an agreement that rank 1 never joins.
FAIL_ALONE = """
import sys, time
import torch.distributed as dist
from megatron_solopo.train.signals import StopSignals
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
with StopSignals() as signals:
    signals.join()
    try:
        if rank == 1:
            time.sleep(250)
        signals.check_meanwhile()
        raise RuntimeError("a bug")
    finally:
        signals.leave()
        dist.destroy_process_group()
"""

# Rank 1 joins the last agreement late. The interpreter of rank 0 takes long to end: a thread that still frees the
# agreement or the group then finds no interpreter, and aborts the process.
END_SLOWLY = """
import sys, time
import torch.distributed as dist
from megatron_solopo.train.signals import StopSignals

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(4)

def run(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with StopSignals() as signals:
        signals.join()
        time.sleep(2 * rank)
        signals.check_meanwhile()
        signals.conclude()
        signals.leave()
        dist.destroy_process_group()

slow = Slow()
run(int(sys.argv[1]), sys.argv[2])
"""


def start_ranks(script: str, folder: Path) -> list[subprocess.Popen[bytes]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    return [subprocess.Popen([*command, str(rank), folder / "store"], env=environment) for rank in range(2)]


def test_an_interpreter_that_ends_slowly_finds_no_thread(tmp_path: Path) -> None:
    ranks = start_ranks(END_SLOWLY, tmp_path)
    try:
        assert [process.wait(120) for process in ranks] == [0, 0]
    finally:
        kill(ranks)


def kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        process.kill()
        process.wait()


def test_runs_of_the_console_script_that_end_well_exit_with_0(tmp_path: Path) -> None:
    assert exit_codes(make_inputs(tmp_path), 0, 5, side_by_side=5) == [0] * 5


def test_runs_of_the_console_script_that_are_stopped_exit_with_85(tmp_path: Path) -> None:
    assert exit_codes(make_inputs(tmp_path), exits.STOPPED, 2, side_by_side=2) == [exits.STOPPED] * 2


def end_well(session: Session) -> None:
    pass


def end_with_an_error(session: Session) -> None:
    raise RuntimeError("a bug")


def end_with_ctrl_c(session: Session) -> None:
    raise KeyboardInterrupt


def end_by_a_signal(session: Session) -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(2):
        session.enter_or_stop("data", 1)


ENDS: dict[Any, type[BaseException] | None] = {
    end_well: None,
    end_with_an_error: RuntimeError,
    end_with_ctrl_c: KeyboardInterrupt,
    end_by_a_signal: SystemExit,
}


def ours_since(before: set[threading.Thread]) -> list[str]:
    """Names of the threads that were started since, without that of tqdm, which holds progress bars alone."""
    return [each.name for each in set(threading.enumerate()) - before if each.name != "tqdm_monitor"]


def threads_left(folder: Path) -> dict[str, Any]:
    """By the way in which a session ends: what it raised, the threads that it left, what its signals still hold."""
    found: dict[str, Any] = {}
    for end in ENDS:
        before, raised = set(threading.enumerate()), None
        config = small_config(folder, end.__name__, {}, objective={"loss_type": "simpo"})
        try:
            with open_session(config) as session:
                session.enter_or_stop("data", 1)
                session.before_pack()
                running = {each.name for each in set(threading.enumerate()) - before}
                assert {"signals", "watchdog", "roll call"} <= running
                end(session)
        except BaseException as error:
            raised = type(error)
        found[end.__name__] = raised, ours_since(before), session.signals._agreeing, session.signals._stages
    return found


def test_a_session_leaves_no_thread_and_no_collective_however_it_ends(tmp_path: Path) -> None:
    expected = {end.__name__: (raised, [], None, []) for end, raised in ENDS.items()}
    assert run_distributed(threads_left, 2, make_run_inputs(tmp_path)) == [expected] * 2


def saving_config(folder: Path, name: str, max_steps: int) -> Config:
    return small_config(
        folder,
        name,
        {},
        training={"global_batch_size": 4, "max_steps": max_steps},
        objective={"loss_type": "simpo"},
        checkpoint={"async_save": True, "save_steps": 1},
        logging={"tensorboard": True},
    )


def fail_during_a_save(folder: Path) -> tuple[list[str], bool]:
    """The second step fails during the first one's save; returns the threads left, and whether the save still runs."""
    before, savers = set(threading.enumerate()), []
    save = Saver.save

    def watched(saver: Saver, *arguments: Any, **keywords: Any) -> None:
        save(saver, *arguments, **keywords)
        savers.append(saver)
        assert saver.is_running

    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.MonkeyPatch.context() as patch, at_call(Policy, "step", 2, 0, fail):
        patch.setattr(Saver, "save", watched)
        with pytest.raises(RuntimeError, match="a bug"):
            train(saving_config(folder, "failed", 4))
    return ours_since(before), savers[0].is_running


def save_to_the_end(folder: Path) -> tuple[list[str], list[set[int]]]:
    """Returns the threads left, and where the tensors were that each save wrote. The last one runs in no background."""
    before, places = set(threading.enumerate()), []
    stage = ShardedFiles.stage

    def watched(files: ShardedFiles) -> None:
        stage(files)
        places.append({each.data_ptr() for _, _, (_, pairs) in files._writer.write_buckets for _, each in pairs})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedFiles, "stage", watched)
        train(saving_config(folder, "whole", 3))
    return ours_since(before), places


def saves_in_the_background(folder: Path) -> tuple[Any, Any]:
    return fail_during_a_save(folder), save_to_the_end(folder)


def test_saves_in_the_background_leave_no_thread_and_keep_one_copy(tmp_path: Path) -> None:
    failed, (left, places) = run_distributed(saves_in_the_background, 1, make_run_inputs(tmp_path))[0]
    assert failed == ([], False) and left == []
    first, second, last = places
    assert first and first == second == last


def test_a_store_that_does_not_answer_delays_the_end_by_a_few_pulses_alone() -> None:
    answers = threading.Event()

    class Silent:
        def set(self, key: str, value: str) -> None:
            answers.wait()

    call = RollCall(Silent(), 0, 1, 0.05, host="node0", neighbours=[0])
    call.start()
    time.sleep(0.2)
    started = time.monotonic()
    call.leave()
    assert time.monotonic() - started < 2
    answers.set()


def test_a_rank_that_fails_alone_exits_and_waits_for_no_agreement(tmp_path: Path) -> None:
    ranks = start_ranks(FAIL_ALONE, tmp_path)
    try:
        assert ranks[0].wait(120) == 1
        assert ranks[1].poll() is None
    finally:
        kill(ranks)


def test_groups_end_where_the_ranks_do_not_start_alike() -> None:
    def refuse() -> None:
        raise ValueError("the ranks do not start alike")

    config = small_config(Path("unused"), "run", {}, objective={"loss_type": "simpo"})
    with pytest.raises(ValueError, match="start alike"):
        topology.initialize(config.parallel, 1, refuse)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("delayed", "stages", "in_a_step", "in_a_pass"),
    [(False, 1, 1, 1), (True, 1, 0, 1), (False, 2, 0, 0), (True, 2, 0, 0)],
)
def test_where_a_run_may_stop_between_packs(
    tmp_path: Path, delayed: bool, stages: int, in_a_step: int, in_a_pass: int
) -> None:
    """A step that is left changes delayed scales, and one with pipeline stages has packs under way."""
    fp8 = {"fp8": "hybrid", "fp8_recipe": "delayed"} if delayed else {}
    config = small_config(tmp_path, "run", {}, model={"path": tmp_path, "dtype": "bfloat16", **fp8})
    topology_, signals, watchdog = mock.Mock(), mock.Mock(), mock.Mock()
    topology_.pipeline_group.size.return_value = stages
    session = Session(config, mock.Mock(), topology_, (), signals, watchdog)
    session.before_pack()
    assert signals.check_meanwhile.call_count == in_a_step
    session.points("evaluation", 1).before_pack()
    assert signals.check_meanwhile.call_count == in_a_step + in_a_pass
    assert watchdog.progress.call_count == 2
