"""A file system that does not answer, or takes nothing, does not keep a rank that hangs."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_solopo import exits
from megatron_solopo.config import WatchdogConfig
from megatron_solopo.train import watchdog
from tests.distributed import exit_codes


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
def test_the_rank_ends_all_the_same(broken: Callable[[Path], None], tmp_path: Path) -> None:
    broken(tmp_path)
    assert exit_codes(hang, 1, tmp_path, patience=50) == [exits.HUNG]
