"""A run that hangs ends by itself, with the stacks, and with the name of who did not arrive."""

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pydantic import ValidationError

from megatron_solopo import exits
from megatron_solopo.config import WatchdogConfig
from megatron_solopo.train import watchdog
from megatron_solopo.train.policy import Policy
from megatron_solopo.train.trainer import train
from megatron_solopo.train.watchdog import RollCall
from tests.distributed import exit_codes
from tests.train.runs import at_call, make_inputs, small_config

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
LIMIT_SECONDS = 12.0


def stop_rank_2(folder: Path) -> None:
    """At its third step, as an operator's `kill -STOP` would, or a host that goes down without a word."""
    config = small_config(
        folder,
        "run",
        TP2_PP2,
        objective={"loss_type": "simpo"},
        training={"global_batch_size": 4, "max_steps": 4},
        watchdog={"timeout_minutes": LIMIT_SECONDS / 60, "start_timeout_minutes": 5.0},
    )
    with at_call(Policy, "step", 3, 2, stop_this_process):
        train(config)


def stop_this_process() -> None:
    time.sleep(0.5)  # its last place is posted from another thread
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_stopped_rank_is_named_by_the_others_which_end(tmp_path: Path) -> None:
    codes = exit_codes(stop_rank_2, 4, make_inputs(tmp_path), patience=240, until=3)
    assert codes == [exits.HUNG, exits.HUNG, None, exits.HUNG]
    for rank in (0, 1, 3):
        told = (tmp_path / "run" / "hangs" / f"rank-{rank:04d}.txt").read_text()
        assert "step 3, forward and backward" in told.splitlines()[0]
        assert "in step\n" in told and "policy.py" in told, "the main thread's stack"
        verdict = told.splitlines()[-2]
        assert verdict.startswith("silent") and "rank 2 (" in verdict and "last at step 3, forward and" in verdict
        assert not any(f"rank {other}" in verdict for other in (0, 1, 3))


def never_let_go(folder: Path) -> None:
    """A library that holds the interpreter's lock: no thread of Python's runs any more."""
    watchdog._LOCK_HELD_SECONDS = 1.0
    config = WatchdogConfig(start_timeout_minutes=1 / 60)
    with watchdog.watching(config, folder):
        time.sleep(0.5)
        ctypes.PyDLL(None).sleep(200)


def test_a_held_lock_does_not_keep_a_rank_for_ever(tmp_path: Path) -> None:
    assert exit_codes(never_let_go, 1, tmp_path, patience=90) == [1]


def waits(folder: Path) -> None:
    """A phase that is slow at first and is given the time; then one that is not."""
    with watchdog.watching(WatchdogConfig(timeout_minutes=1 / 60, start_timeout_minutes=1.0), folder) as watching:
        for _ in range(2):
            watching.arrive("slow", 1)
            time.sleep(4)
            watching.arrive("other", 1)
        os._exit(0)


def test_the_first_of_a_kind_has_longer(tmp_path: Path) -> None:
    started = time.monotonic()
    assert exit_codes(waits, 1, tmp_path, patience=60) == [exits.HUNG]
    assert time.monotonic() - started > 5
    assert "step 1, slow" in (tmp_path / "hangs" / "rank-0000.txt").read_text()


class Gone:
    """A store behind a cut link."""

    def __getattr__(self, name: str) -> Any:
        threading.Event().wait(10)
        raise RuntimeError(name)


def calls(count: int, store: Any, pulse: float = 0.05) -> list[RollCall]:
    return [
        RollCall(store, rank, count, pulse, host=f"node{rank // 2}", neighbours=[rank // 2 * 2, rank // 2 * 2 + 1])
        for rank in range(count)
    ]


def test_a_rank_that_is_behind_is_named_with_its_phase() -> None:
    ranks = calls(3, dist.HashStore())
    for rank in ranks:
        rank.at(7, 3, "forward and backward")
        rank.start()
    ranks[1].at(6, 3, "data")
    time.sleep(0.2)
    assert ranks[0].missing() == "alive but behind: rank 1 (node0) last at step 3, data"
    assert ranks[2].missing() == ranks[0].missing(), "the first one's finding is everybody's"


def test_who_waits_for_the_finding_is_not_silent() -> None:
    store = dist.HashStore()
    rank = calls(2, store)[0]
    store.add("verdict/asked", 1)  # rank 1 was first, and is reading
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(rank.missing)
        pulses = []
        for _ in range(2):
            time.sleep(0.1)
            pulses.append(json.loads(store.get("place/0"))["pulse"])
        store.set("verdict", "rank 7")
        assert found.result() == "rank 7"
    assert pulses[1] > pulses[0]


def test_all_alike_is_the_networks_fault() -> None:
    ranks = calls(2, dist.HashStore())
    for rank in ranks:
        rank.start()
    time.sleep(0.2)
    assert "at the same place" in ranks[0].missing()


def test_who_never_came_and_who_left_by_itself() -> None:
    ranks = calls(3, dist.HashStore())
    ranks[0].start()
    ranks[1].leave()
    assert ranks[0].missing() == "silent (dead, stopped or cut off): rank 2 never began"


def test_a_store_that_does_not_answer_names_the_other_hosts() -> None:
    verdict = calls(7, Gone())[0].missing()
    assert "node0 is cut off" in verdict
    assert verdict.endswith("ranks on other hosts: ranks 2-6")


@pytest.mark.parametrize("key", ["timeout_minutes", "start_timeout_minutes", "save_timeout_minutes"])
def test_limits_are_positive(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        WatchdogConfig(**{key: 0.0})


def does_not_answer(run_dir: Path) -> None:
    (run_dir / "hangs").mkdir()
    os.mkfifo(run_dir / "hangs" / "rank-0000.txt")  # to open it for writing waits for a reader


def takes_nothing(run_dir: Path) -> None:
    (run_dir / "hangs").touch()


def hang(run_dir: Path) -> None:
    watchdog._FILE_SECONDS = 1.0
    with watchdog.watching(WatchdogConfig(start_timeout_minutes=1 / 60), run_dir):
        time.sleep(200)


@pytest.mark.parametrize("broken", [does_not_answer, takes_nothing])
def test_a_rank_ends_even_if_its_file_cannot_be_written(broken: Callable[[Path], None], tmp_path: Path) -> None:
    broken(tmp_path)
    assert exit_codes(hang, 1, tmp_path, patience=50) == [exits.HUNG]
