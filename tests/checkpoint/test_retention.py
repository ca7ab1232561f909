"""Which checkpoints stay."""

import json
from pathlib import Path

import pytest

from megatron_solopo.checkpoint.directory import (
    check_best_metric,
    checkpoint_name,
    publish,
    read_pointer,
    temporary_path,
    tidy,
)
from megatron_solopo.config import CheckpointConfig
from megatron_solopo.errors import UserError


def save(root: Path, step: int, config: CheckpointConfig, **metrics: float | None) -> None:
    path = temporary_path(root, step)
    path.mkdir(parents=True)
    (path / "trainer.json").write_text(json.dumps({"step": step, "metrics": {"step": step, **metrics}}))
    publish(path, root / checkpoint_name(step))
    tidy(root, config)


def kept(root: Path) -> list[int]:
    assert not list(root.glob(".*")), "nothing half-removed stays"
    return sorted(int(path.name.removeprefix("iter_")) for path in root.glob("iter_*"))


def test_all_stay_by_default(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step, CheckpointConfig())
    assert kept(tmp_path) == [1, 2, 3, 4] and read_pointer(tmp_path, "best") is None


def test_the_newest_and_the_multiples_stay(tmp_path: Path) -> None:
    for step in range(1, 10):
        save(tmp_path, step, CheckpointConfig(keep_last=2, keep_every=3))
        assert step in kept(tmp_path)
    assert kept(tmp_path) == [3, 6, 8, 9]


LOSSES = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.5}


@pytest.mark.parametrize(("greater", "best", "stay"), [(False, 2, [2, 5]), (True, 1, [1, 5])])
def test_the_best_stays(greater: bool, best: int, stay: list[int], tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=1, best_metric="eval_loss", greater_is_better=greater)
    for step, loss in LOSSES.items():
        save(tmp_path, step, config, eval_loss=loss)
    assert read_pointer(tmp_path, "best") == checkpoint_name(best) and kept(tmp_path) == stay


def test_what_latest_names_stays_where_a_person_turned_back(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, CheckpointConfig())
    (tmp_path / "latest").write_text("iter_0000002\n")
    save(tmp_path, 3, CheckpointConfig(keep_last=2))
    assert kept(tmp_path) == [2, 3, 4, 5, 6], "the one before stays, in case the newest gets damaged"
    save(tmp_path, 4, CheckpointConfig(keep_last=1))
    assert kept(tmp_path) == [4, 5, 6]


def test_a_metric_that_does_not_exist_is_refused_with_the_legal_ones() -> None:
    config = CheckpointConfig(best_metric="eval_loss")
    check_best_metric(config, ["loss"], evaluates=True)
    with pytest.raises(UserError, match=r"best_metric=eval_loss .* legal: loss; .*training.eval_steps"):
        check_best_metric(config, ["loss"], evaluates=False)
