"""Saves by step and by time, on one rank, with a clock of the test's own."""

from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from megatron_solopo.config import CheckpointConfig
from megatron_solopo.errors import UserError
from megatron_solopo.train.callbacks import SaveClock, deadline
from megatron_solopo.train.state import SkippedSteps, TrainState
from tests.ranks import layout


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with layout():
        yield


class Run:
    """Steps of `step` seconds and saves of `save` seconds; `saves` maps the steps saved to why.

    A save after the first step takes `failing_save` seconds and fails, if that is given. The first
    step begins at `start`, and the run was built `before_first_step` seconds earlier.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        steps: int,
        step: float,
        save: float,
        start: float = 1e9,
        before_first_step: float = 0,
        failing_save: float | None = None,
    ) -> None:
        self.now = start - before_first_step
        self.saves: dict[int, str] = {}
        self.saved_at: dict[int, float] = {}
        clock = SaveClock(config, now=lambda: self.now)
        self.now = start
        clock.on_start(TrainState(0, {}, SkippedSteps()))
        for number in range(1, steps + 1):
            self.now += step
            if failing_save is not None and number == 1:
                clock.on_save_begin()
                self.now += failing_save
                clock.on_save_failed()
            if reason := clock.reason_to_save(number, is_last=number == steps):
                clock.on_save_begin()
                self.now += save
                clock.on_saved()
                self.saves[number], self.saved_at[number] = reason, self.now


def test_steps_and_the_end() -> None:
    run = Run(CheckpointConfig(save_steps=3), steps=7, step=1, save=1)
    assert run.saves == {3: "checkpoint.save_steps=3", 6: "checkpoint.save_steps=3", 7: "the end"}


def test_minutes_since_the_last_save_began() -> None:
    run = Run(CheckpointConfig(every_minutes=1), steps=10, step=25, save=10)
    assert run.saves == dict.fromkeys((3, 5, 7, 9), "checkpoint.every_minutes=1") | {10: "the end"}


def test_a_run_is_saved_every_hour_by_default() -> None:
    run = Run(CheckpointConfig(), steps=10, step=25 * 60, save=10)
    assert run.saves == dict.fromkeys((3, 6, 9), "checkpoint.every_minutes=60") | {10: "the end"}


def test_a_save_that_failed_is_no_part_of_the_next_steps_time() -> None:
    """Its time would move the last save before a deadline to an earlier step."""
    config = CheckpointConfig(must_save_by="2030-01-31T18:00:00+00:00")
    by = deadline(config)
    assert by is not None
    run = Run(config, steps=200, step=10, save=20, start=by - 1500, failing_save=500)
    _, late, _ = run.saves
    assert by - 2 * (10 + 20) - 10 <= run.saved_at[late] - 20 and run.saved_at[late] <= by


def test_the_last_save_before_a_deadline_is_in_time_and_late() -> None:
    moment = "2030-01-31T18:00:00+00:00"
    config = CheckpointConfig(must_save_by=moment)
    by = deadline(config)
    assert by is not None
    run = Run(config, steps=200, step=10, save=20, start=by - 1000)
    early, late, end = run.saves
    assert run.saved_at[early] - 20 >= by - 300, "five minutes before, nothing having been timed"
    assert by - 2 * (10 + 20) - 10 <= run.saved_at[late] - 20 and run.saved_at[late] <= by
    assert end == 200 and run.saves[late] == f"checkpoint.must_save_by={moment}"


def test_steps_longer_than_the_time_assumed_are_saved_before_the_deadline() -> None:
    config = CheckpointConfig(must_save_by="2030-01-31T18:00:00+00:00")
    by = deadline(config)
    assert by is not None
    run = Run(config, steps=5, step=700, save=20, start=by - 1800)
    (first, *_) = run.saves
    assert run.saved_at[first] <= by and run.saves[first].startswith("checkpoint.must_save_by")


def test_the_time_before_the_first_step_is_no_step() -> None:
    config = CheckpointConfig(must_save_by="2030-01-31T18:00:00+00:00")
    by = deadline(config)
    assert by is not None
    run = Run(config, steps=200, step=10, save=20, start=by - 1000, before_first_step=3600)
    _, late, _ = run.saves
    assert by - 2 * (10 + 20) - 10 <= run.saved_at[late] - 20 and run.saved_at[late] <= by


def test_a_deadline_that_has_passed_saves_nothing() -> None:
    run = Run(CheckpointConfig(must_save_by="2020-01-01T00:00"), steps=5, step=10, save=1, start=2e9)
    assert list(run.saves) == [5]


def test_slurms_end_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1900000000")
    assert deadline(CheckpointConfig(must_save_by="slurm")) == 1_900_000_000
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    with pytest.raises(UserError, match="SLURM_JOB_END_TIME is not set"):
        deadline(CheckpointConfig(must_save_by="slurm"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"must_save_by": "tomorrow"}, "'tomorrow' is neither an ISO time"),
        ({"keep_every": 2, "keep_last": None}, "keep_last"),
        ({"greater_is_better": True}, "best_metric"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        CheckpointConfig(**keys)
