"""Thirty runs to each exit code, on a loaded machine: what aborts one run in three shows here, and in no single run."""

from pathlib import Path

import pytest

from megatron_solopo import exits
from tests.train.console import exit_codes, make_inputs

RUNS = 30


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("expected", [0, exits.STOPPED, exits.HUNG])
def test_thirty_runs_end_with_the_same_code(tmp_path: Path, expected: int) -> None:
    assert exit_codes(make_inputs(tmp_path), expected, RUNS, side_by_side=4) == [expected] * RUNS
