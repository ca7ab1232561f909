"""What a death leaves in the directory of checkpoints, at every moment of a save."""

import contextlib
from pathlib import Path

import pytest

from megatron_solopo.checkpoint import directory
from megatron_solopo.checkpoint.directory import (
    candidates,
    checkpoint_name,
    publish,
    read_pointer,
    recover,
    set_aside,
    temporary_path,
    write_pointer,
)


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
    assert directory.checkpoints(tmp_path) == []
