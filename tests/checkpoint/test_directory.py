"""The directory of checkpoints: what a death leaves at every moment of a save, which ones stay, and damaged ones."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_solopo.checkpoint import directory
from megatron_solopo.checkpoint.directory import (
    candidates,
    check_best_metric,
    checkpoint_name,
    checkpoints,
    newest_checkpoint,
    publish,
    read_pointer,
    recover,
    set_aside,
    temporary_path,
    tidy,
    write_pointer,
)
from megatron_solopo.checkpoint.save import ShardedSave
from megatron_solopo.config import CheckpointConfig
from megatron_solopo.errors import UserError
from megatron_solopo.train.policy import Policy


class Killed(BaseException):
    pass


def complete(root: Path, step: int, text: str = "new") -> Path:
    path = temporary_path(root, step)
    path.mkdir(parents=True)
    (path / "text").write_text(text)
    return path


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_published_checkpoint_has_its_name_and_is_the_latest(tmp_path: Path) -> None:
    for step in (3, 12_345_678):
        publish(complete(tmp_path, step), tmp_path / checkpoint_name(step))
    assert read_pointer(tmp_path, "latest") == "iter_12345678"
    assert names(tmp_path) == ["iter_0000003", "iter_12345678", "latest"]
    assert [path.name for path in candidates(tmp_path)] == ["iter_12345678", "iter_0000003"]


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("moment", range(1, 8))
def test_a_death_at_any_moment_loses_nothing(
    moment: int, existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the n-th change of the file system: the checkpoint before it, or the new one."""
    publish(complete(tmp_path, 1), tmp_path / checkpoint_name(1))
    if existed:
        publish(complete(tmp_path, 2, "old"), tmp_path / checkpoint_name(2))
        write_pointer(tmp_path, "latest", checkpoint_name(1))
    temporary = complete(tmp_path, 2)
    count = 0

    def counting(name: str, change):
        def changed(self: Path, *arguments, **options):
            nonlocal count
            count += 1
            if count == moment:
                raise Killed
            return change(self, *arguments, **options)

        monkeypatch.setattr(Path, name, changed)

    for name in ("rename", "replace", "write_text"):
        counting(name, getattr(Path, name))
    with contextlib.suppress(Killed):
        publish(temporary, tmp_path / checkpoint_name(2))
    monkeypatch.undo()
    recover(tmp_path)
    best = candidates(tmp_path)[0]
    texts = {"iter_0000001": ["new"], "iter_0000002": ["new"]}
    assert (best / "text").read_text() in texts[best.name]
    assert (best.name == "iter_0000002") == (moment > 2), "once the new one is complete and announced, it counts"
    if existed:
        assert (tmp_path / "iter_0000002" / "text").read_text() == ("new" if moment > 2 else "old")
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_half_written_checkpoint_is_removed(tmp_path: Path) -> None:
    complete(tmp_path, 5)
    recover(tmp_path)
    assert names(tmp_path) == []


def test_only_what_latest_names_and_older_ones_are_candidates(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        publish(complete(tmp_path, step), tmp_path / checkpoint_name(step))
    write_pointer(tmp_path, "latest", checkpoint_name(2))
    assert [path.name for path in candidates(tmp_path)] == ["iter_0000002", "iter_0000001"]
    for torn in ("", "iter_00"):
        (tmp_path / "latest").write_text(torn)
        assert candidates(tmp_path)[0].name == "iter_0000003"
    (tmp_path / "latest").unlink()
    assert candidates(tmp_path)[0].name == "iter_0000003"


def test_set_aside_never_replaces(tmp_path: Path) -> None:
    for text in ("first", "second"):
        publish(complete(tmp_path, 1, text), tmp_path / checkpoint_name(1))
        set_aside(tmp_path / checkpoint_name(1))
    assert (tmp_path / "damaged_iter_0000001" / "text").read_text() == "first"
    assert (tmp_path / "damaged_iter_0000001.2" / "text").read_text() == "second"
    assert checkpoints(tmp_path) == []


def save_measured(root: Path, step: int, config: CheckpointConfig, **metrics: float | None) -> None:
    path = temporary_path(root, step)
    path.mkdir(parents=True)
    (path / "trainer.json").write_text(json.dumps({"step": step, "metrics": {"step": step, **metrics}}))
    publish(path, root / checkpoint_name(step))
    tidy(root, config)


def kept(root: Path) -> list[int]:
    assert not list(root.glob(".*")), "nothing half-removed stays"
    return sorted(int(path.name.removeprefix("iter_")) for path in root.glob("iter_*"))


def test_three_stay_by_default_and_all_if_asked(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_measured(tmp_path / "few", step, CheckpointConfig())
        save_measured(tmp_path / "all", step, CheckpointConfig(keep_last=None))
    assert kept(tmp_path / "few") == [3, 4, 5] and read_pointer(tmp_path / "few", "best") is None
    assert kept(tmp_path / "all") == [1, 2, 3, 4, 5]


def test_a_checkpoint_that_was_given_up_after_its_announcement_does_not_become_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system refuses its name, and what was written of it is removed."""
    publish(complete(tmp_path, 1), tmp_path / checkpoint_name(1))
    temporary = complete(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(directory, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            publish(temporary, tmp_path / checkpoint_name(2))
    shutil.rmtree(temporary)
    recover(tmp_path)
    assert read_pointer(tmp_path, "latest") == "iter_0000001" and names(tmp_path) == ["iter_0000001", "latest"]


def full_disk(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_newest_and_the_multiples_stay(tmp_path: Path) -> None:
    for step in range(1, 10):
        save_measured(tmp_path, step, CheckpointConfig(keep_last=2, keep_every=3))
        assert step in kept(tmp_path)
    assert kept(tmp_path) == [3, 6, 8, 9]


LOSSES = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.5}


@pytest.mark.parametrize(("greater", "best", "stay"), [(False, 2, [2, 5]), (True, 1, [1, 5])])
def test_the_best_stays(greater: bool, best: int, stay: list[int], tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=1, best_metric="eval_loss", greater_is_better=greater)
    for step, loss in LOSSES.items():
        save_measured(tmp_path, step, config, eval_loss=loss)
    assert read_pointer(tmp_path, "best") == checkpoint_name(best) and kept(tmp_path) == stay


def test_what_latest_names_stays_where_a_person_turned_back(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_measured(tmp_path, step, CheckpointConfig(keep_last=None))
    (tmp_path / "latest").write_text("iter_0000002\n")
    save_measured(tmp_path, 3, CheckpointConfig(keep_last=2))
    assert kept(tmp_path) == [2, 3, 4, 5, 6], "the one before stays, in case the newest gets damaged"
    save_measured(tmp_path, 4, CheckpointConfig(keep_last=1))
    assert kept(tmp_path) == [4, 5, 6]


def test_a_metric_that_does_not_exist_is_refused_with_the_legal_ones() -> None:
    config = CheckpointConfig(best_metric="eval_loss")
    check_best_metric(config, ["loss"], ["loss"])
    with pytest.raises(UserError, match=r"best_metric=eval_loss .* legal: loss; .*training.eval_steps"):
        check_best_metric(config, ["loss"], [])


def test_a_metric_of_a_source_without_held_out_rows_is_none_of_the_evaluation() -> None:
    config = CheckpointConfig(best_metric="eval_source/pairs/loss")
    of_step = ["loss", "source/pairs/loss", "source/chats/loss"]
    with pytest.raises(UserError, match=r"legal: .*, source/chats/loss, eval_loss, eval_source/chats/loss$"):
        check_best_metric(config, of_step, ["loss", "source/chats/loss"])


def save(policy: Policy, root: Path, step: int) -> Path:
    return ShardedSave(root, policy.chunks, policy.optimizer, {"step": step}, {"config.json": b"{}"}).complete()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("*.distcp", flip),
    ("*.distcp", truncate),
    ("*.distcp", Path.unlink),
    (".metadata", flip),
    ("metadata.json", Path.unlink),
    ("trainer.json", flip),
    ("manifest.json", Path.unlink),
    ("manifest.json", truncate),
]


@pytest.mark.parametrize(("pattern", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(policy, pattern, damage, tmp_path) -> None:
    good, bad = save(policy, tmp_path, 1), save(policy, tmp_path, 2)
    file = next(bad.glob(pattern))
    damage(file)
    said: list[str] = []
    assert newest_checkpoint(tmp_path, checksums=True, say=said.append) == (good, {"step": 1})
    (line,) = said
    assert str(file) in line and "damaged_iter_0000002" in line and "continuing from iter_0000001" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged_iter_0000002", "iter_0000001", "latest"]
    assert (tmp_path / "latest").read_text() == "iter_0000001\n"
    assert newest_checkpoint(tmp_path, checksums=True, say=pytest.fail) == (good, {"step": 1})


def test_nothing_is_renamed_for_a_run_that_the_checkpoint_is_not_of(policy, tmp_path) -> None:
    good, bad = save(policy, tmp_path, 1), save(policy, tmp_path, 2)
    truncate(next(bad.glob("*.distcp")))
    before = [(path, path.read_bytes()) for path in sorted(tmp_path.rglob("*")) if path.is_file()]

    def refuse(path: Path, state: dict[str, int]) -> None:
        assert (path, state) == (good, {"step": 1})
        raise UserError("another run's")

    with pytest.raises(UserError, match="another run's"):
        newest_checkpoint(tmp_path, checksums=True, say=pytest.fail, accept=refuse)
    assert [(path, path.read_bytes()) for path in sorted(tmp_path.rglob("*")) if path.is_file()] == before


def test_without_a_good_checkpoint_nothing_is_touched(policy, tmp_path) -> None:
    for step in (1, 2):
        truncate(next(save(policy, tmp_path, step).glob("*.distcp")))
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):  # a second start must not take it for a new run
        with pytest.raises(UserError, match="no checkpoint that is whole") as error:
            newest_checkpoint(tmp_path, checksums=True, say=pytest.fail)
        assert "iter_0000001/__0_0.distcp" in str(error.value) and "iter_0000002/__0_0.distcp" in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_directory_that_latest_names_is_told(policy, tmp_path) -> None:
    good = save(policy, tmp_path, 1)
    shutil.rmtree(save(policy, tmp_path, 2))
    said: list[str] = []
    assert newest_checkpoint(tmp_path, checksums=True, say=said.append) == (good, {"step": 1})
    assert "iter_0000002: no such directory" in said[0]


def test_an_edited_chat_template_is_told_and_taken(policy, tmp_path) -> None:
    path = save(policy, tmp_path, 1)
    (path / "huggingface" / "config.json").write_text("{} ")
    said: list[str] = []
    assert newest_checkpoint(tmp_path, checksums=True, say=said.append) == (path, {"step": 1})
    assert "huggingface/config.json" in said[0]
