"""Damaged checkpoints, full disks and read-only directories: told by file, and nothing is lost. On one rank."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_solopo.checkpoint import save as pending
from megatron_solopo.checkpoint.directory import newest_checkpoint
from megatron_solopo.checkpoint.load import begin_save, load_checkpoint
from megatron_solopo.checkpoint.save import CheckpointContent
from megatron_solopo.errors import UserError
from megatron_solopo.train.policy import Policy


def save(policy: Policy, root: Path, step: int) -> Path:
    return begin_save(
        root, policy.chunks, policy.optimizer, CheckpointContent({"step": step}, {"config.json": b"{}"})
    ).complete()


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


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small tmpfs needs root with CAP_SYS_ADMIN")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("room_kib", [8, 100, 180, 400])
def test_a_disk_that_fills_up_during_the_save_leaves_what_was_saved(policy, room_kib, tmp_path, monkeypatch) -> None:
    """Real ENOSPC, at several places of a save; what statfs says does not warn of it (a quota, another writer)."""
    with mounted(tmp_path / "disk", "size=4m") as disk:
        good = save(policy, disk, 1)
        free = shutil.disk_usage(disk).free
        (disk / "other").write_bytes(bytes(free - (room_kib << 10)))
        total = sum(file.stat().st_size for file in good.rglob("*") if file.is_file())
        assert total > 400 << 10, "so that none of the parametrized rooms suffices"
        monkeypatch.setattr(pending, "_free_bytes", lambda path: 1 << 40)
        with pytest.raises(UserError) as error:
            save(policy, disk, 2)
        message = str(error.value)
        assert message.startswith(f"{disk / 'iter_0000002'} was not saved: ") and "No space left on device" in message
        assert "\n" not in message and message.endswith("what was saved before is intact")
        assert sorted(path.name for path in disk.iterdir()) == ["iter_0000001", "latest", "other"]
        assert newest_checkpoint(disk, checksums=True, say=pytest.fail) == (good, {"step": 1})
        (disk / "other").unlink()
        assert save(policy, disk, 2).is_dir()


def test_a_save_in_the_background_that_fails_is_told_when_it_is_completed(policy, tmp_path, monkeypatch) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        good = save(policy, disk, 1)
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - (180 << 10)))
        monkeypatch.setattr(pending, "_free_bytes", lambda path: 1 << 40)
        begun = begin_save(disk, policy.chunks, policy.optimizer, CheckpointContent({"step": 2}, {}), background=True)
        with pytest.raises(UserError, match=r"iter_0000002 was not saved: .*No space left on device"):
            begun.complete()
        assert sorted(path.name for path in disk.iterdir()) == ["iter_0000001", "latest", "other"]
        assert newest_checkpoint(disk, checksums=True, say=pytest.fail) == (good, {"step": 1})


def test_a_save_in_the_background_holds_the_state_it_began_with(policy, tmp_path) -> None:
    before = [p.detach().clone() for chunk in policy.chunks for p in chunk.parameters()]
    begun = begin_save(tmp_path, policy.chunks, policy.optimizer, CheckpointContent({"step": 1}, {}), background=True)
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
    load_checkpoint(begun.complete(), policy.chunks, policy.optimizer)
    after = [p.detach() for chunk in policy.chunks for p in chunk.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_too_little_room_is_told_before_anything_is_written(policy, tmp_path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(UserError, match=r"it takes \d.* are free on its file system") as error:
            save(policy, disk, 1)
        assert str(disk / "iter_0000001") in str(error.value)
        assert list(disk.iterdir()) == []


def test_a_read_only_directory_is_named(policy, tmp_path) -> None:
    with mounted(tmp_path / "disk", "size=8m") as disk:
        good = save(policy, disk, 1)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(UserError, match="Read-only file system") as error:
            save(policy, disk, 2)
        assert str(disk / "iter_0000002") in str(error.value)
        # What is there can be loaded from it, and is not tidied.
        assert newest_checkpoint(disk, checksums=True, say=pytest.fail) == (good, {"step": 1})
        load_checkpoint(good, policy.chunks, policy.optimizer)


def test_the_estimate_is_what_a_checkpoint_takes(policy, tmp_path, monkeypatch) -> None:
    asked: list[int] = []
    described = pending.described_bytes
    monkeypatch.setattr(pending, "described_bytes", lambda count: asked.append(count) or described(count))
    monkeypatch.setattr(pending, "_free_bytes", lambda path: 0)
    with pytest.raises(UserError):
        save(policy, tmp_path, 1)
    monkeypatch.undo()
    path = save(policy, tmp_path, 1)
    taken = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert taken <= asked[0] <= taken + (1 << 20)
    assert sum(p.numel() for chunk in policy.chunks for p in chunk.parameters()) * 12 <= asked[0]
    assert torch.is_grad_enabled()
