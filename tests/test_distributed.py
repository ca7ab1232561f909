"""Ranks are forks of a process that has imported what they need: a launch costs no imports."""

import sys
import threading

from tests.distributed import run_distributed


def found_at_the_start() -> tuple[bool, int]:
    """Whether this rank was given the imports, and how many threads of Python it was given with them."""
    return "tests.preloaded" in sys.modules, threading.active_count()


def test_a_rank_begins_with_its_imports_and_without_other_threads() -> None:
    # The second thread writes this rank's result.
    assert all(is_loaded and threads <= 2 for is_loaded, threads in run_distributed(found_at_the_start, 2))
