"""Every row of the failures page names the tests that show it, or says that there is none."""

import re

import pytest

from tests.slurm.cluster import ROOT

PAGE = ROOT / "examples" / "slurm" / "FAILURES.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and line.count("|") == 6 and not line.startswith(("| ---", "| what |"))
]


def test_all_that_can_die_is_there() -> None:
    assert len(ROWS) >= 18
    text = " ".join(row[0] for row in ROWS)
    for what in ("rank", "node", "launcher", "network", "disk is full", "preemption", "time limit", "NaN", "hangs"):
        assert what in text, what


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_is_shown_by_tests_that_exist_or_says_not_tested(row: list[str]) -> None:
    assert all(row)
    shown_by = row[4]
    paths = re.findall(r"`((?:tests|tools)/[\w/.]+)`", shown_by)
    assert shown_by.startswith("not tested") or paths or shown_by == "the same"
    assert all((ROOT / path).exists() for path in paths), paths
