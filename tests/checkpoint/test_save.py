"""Saves on one rank: what they hold, and what an interruption, a full disk or a read-only directory leaves behind.

Whole runs cover how a run continues under every parallel layout.
"""

import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_solopo.checkpoint import save as save_module
from megatron_solopo.checkpoint.directory import newest_checkpoint
from megatron_solopo.checkpoint.host_copies import HostCopies
from megatron_solopo.checkpoint.load import load_checkpoint
from megatron_solopo.checkpoint.manifest import read_manifest, sealed_files, write_manifest
from megatron_solopo.checkpoint.save import ShardedSave
from megatron_solopo.checkpoint.sharded_state import state_to_save
from megatron_solopo.errors import OutOfSpaceError, UserError
from megatron_solopo.parallel.megatron_internals import ShardedFiles, optimizer_parts
from megatron_solopo.train.policy import Policy
from tests.disks import mounted

MODEL_FILES = {"config.json": b"{}", "additional_chat_templates/tool.jinja": b"x"}


def fill(policy: Policy, value: float) -> None:
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(value)


def values(policy: Policy) -> set[float]:
    return {float(number) for chunk in policy.chunks for p in chunk.parameters() for number in p.detach().unique()}


def save(policy: Policy, root: Path, step: int) -> Path:
    state = {"step": step, "seen": step * 4}
    return ShardedSave(root, policy.chunks, policy.optimizer, state, MODEL_FILES).complete()


def begin(policy: Policy, root: Path, step: int, copies: HostCopies) -> ShardedSave:
    state = {"step": step}
    return ShardedSave(root, policy.chunks, policy.optimizer, state, {}, copies=copies, in_background=True)


def newest(root: Path) -> tuple[Path, dict[str, int]] | None:
    return newest_checkpoint(root, checksums=True, say=pytest.fail)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_not_finite_is_refused(policy: Policy, name: str, tmp_path: Path) -> None:
    state = next(iter(optimizer_parts(policy.optimizer)[0].optimizer.state.values()))
    kept = state[name].clone()
    state[name].view(-1)[-1] = torch.inf
    path = save(policy, tmp_path, 1)
    state[name].copy_(kept)
    with pytest.raises(UserError, match=f"iter_0000001: the optimizer's {name} is not finite"):
        load_checkpoint(path, policy.chunks, policy.optimizer)
    next(iter(optimizer_parts(policy.optimizer)[0].optimizer.state.values()))[name].copy_(kept)


class Interrupted(BaseException):
    """Like Ctrl-C: no Exception."""


def interrupted_write(self: ShardedSave, *arguments: object) -> None:
    (self._folder / "half.distcp").write_text("half")
    raise Interrupted


def test_a_checkpoint_brings_back_weights_and_state(policy: Policy, tmp_path: Path) -> None:
    fill(policy, 0.25)
    path = save(policy, tmp_path, 3)
    fill(policy, 0.5)
    assert path == tmp_path / "iter_0000003"
    assert newest(tmp_path) == (path, {"seen": 12, "step": 3})
    load_checkpoint(path, policy.chunks, policy.optimizer)
    assert values(policy) == {0.25}


def test_a_checkpoint_with_states_of_random_generators_still_loads(policy: Policy, tmp_path: Path) -> None:
    """Earlier versions wrote such files and listed them in the manifest."""
    fill(policy, 0.25)
    path = save(policy, tmp_path, 1)
    name = "rng/rank_00000.safetensors"
    (path / name).parent.mkdir()
    (path / name).write_bytes(b"state")
    write_manifest(path, read_manifest(path) | sealed_files(path, [name]))
    fill(policy, 0.5)
    assert newest(tmp_path) == (path, {"seen": 4, "step": 1})
    load_checkpoint(path, policy.chunks, policy.optimizer)
    assert values(policy) == {0.25}


def test_an_interrupted_checkpoint_leaves_the_one_before(policy, tmp_path, monkeypatch) -> None:
    fill(policy, 0.25)
    first = save(policy, tmp_path, 1)
    fill(policy, 0.5)
    for step in (2, 1):  # a new one, and the same one again
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(ShardedSave, "_write_file", interrupted_write)
            save(policy, tmp_path, step)
        assert newest(tmp_path) == (first, {"seen": 4, "step": 1})
        assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]
    load_checkpoint(first, policy.chunks, None)
    assert values(policy) == {0.25}


def test_what_an_interruption_left_is_not_in_the_way(policy, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ShardedSave, "_write_file", interrupted_write)
        save(policy, tmp_path, 2)
    assert newest(tmp_path) is None
    path = save(policy, tmp_path, 2)
    assert newest(tmp_path) == (path, {"seen": 8, "step": 2}) and not (path / "half.distcp").exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["iter_0000002", "latest"]


def test_nothing_saved_yet_is_no_checkpoint(policy: Policy, tmp_path: Path) -> None:
    assert newest(tmp_path) is None and newest(tmp_path / "absent") is None


def test_the_same_step_can_be_saved_again(policy: Policy, tmp_path: Path) -> None:
    fill(policy, 0.25)
    save(policy, tmp_path, 1)
    fill(policy, 0.5)
    path = save(policy, tmp_path, 1)
    load_checkpoint(path, policy.chunks, None)
    assert values(policy) == {0.5}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["iter_0000001", "latest"]


def test_a_checkpoint_holds_no_state_of_kernels_and_loads_into_a_model_that_has_some(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine's modules have such a state: here, of a module that has one too."""
    norm = type(policy.chunks[0].module.decoder.final_layernorm)
    monkeypatch.setattr(norm, "get_extra_state", lambda self: torch.ones(1), raising=False)
    monkeypatch.setattr(norm, "set_extra_state", lambda self, state: pytest.fail("was loaded"), raising=False)
    assert any(name.endswith("_extra_state") for name in policy.chunks[0].module.state_dict())
    fill(policy, 0.5)
    path = save(policy, tmp_path, 1)
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    assert saved and not any(name.endswith("_extra_state") for name in saved)
    fill(policy, 0.0)
    load_checkpoint(path, policy.chunks, policy.optimizer)
    assert values(policy) == {0.5}


@pytest.mark.parametrize("room_kib", [8, 100, 180, 400])
def test_a_disk_that_fills_up_during_the_save_leaves_what_was_saved(policy, room_kib, tmp_path, monkeypatch) -> None:
    """Real ENOSPC, at several places of a save; what statfs says does not warn of it (a quota, another writer)."""
    with mounted(tmp_path / "disk", "size=4m") as disk:
        good = save(policy, disk, 1)
        free = shutil.disk_usage(disk).free
        (disk / "other").write_bytes(bytes(free - (room_kib << 10)))
        total = sum(file.stat().st_size for file in good.rglob("*") if file.is_file())
        assert total > 400 << 10, "so that none of the parametrized rooms suffices"
        monkeypatch.setattr(save_module, "_free_bytes", lambda path: 1 << 40)
        with pytest.raises(OutOfSpaceError) as error:
            save(policy, disk, 2)
        message = str(error.value)
        assert message.startswith(f"{disk / 'iter_0000002'} was not saved: ") and "No space left on device" in message
        assert "and its file system has 1024.00 GiB free" in message
        assert "\n" not in message and message.endswith("what was saved before is intact")
        assert sorted(path.name for path in disk.iterdir()) == ["iter_0000001", "latest", "other"]
        assert newest_checkpoint(disk, checksums=True, say=pytest.fail) == (good, {"seen": 4, "step": 1})
        (disk / "other").unlink()
        assert save(policy, disk, 2).is_dir()


def test_a_save_in_the_background_that_fails_is_told_when_it_is_completed(policy, tmp_path, monkeypatch) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        good = save(policy, disk, 1)
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - (180 << 10)))
        monkeypatch.setattr(save_module, "_free_bytes", lambda path: 1 << 40)
        begun = ShardedSave(
            disk, policy.chunks, policy.optimizer, {"step": 2}, {}, copies=HostCopies(), in_background=True
        )
        with pytest.raises(UserError, match=r"iter_0000002 was not saved: .*No space left on device"):
            begun.complete()
        assert sorted(path.name for path in disk.iterdir()) == ["iter_0000001", "latest", "other"]
        assert newest_checkpoint(disk, checksums=True, say=pytest.fail) == (good, {"seen": 4, "step": 1})


def test_a_save_in_the_background_holds_the_state_it_began_with(policy, tmp_path) -> None:
    before = [p.detach().clone() for chunk in policy.chunks for p in chunk.parameters()]
    begun = ShardedSave(
        tmp_path, policy.chunks, policy.optimizer, {"step": 1}, {}, copies=HostCopies(), in_background=True
    )
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
    load_checkpoint(begun.complete(), policy.chunks, policy.optimizer)
    after = [p.detach() for chunk in policy.chunks for p in chunk.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_uses_the_host_memory_of_the_one_before(policy, in_background, tmp_path, monkeypatch) -> None:
    copies, staged = HostCopies(), []
    begin(policy, tmp_path, 1, copies).complete()
    addresses = {place: tensor.data_ptr() for place, tensor in copies._tensors.items()}
    fill(policy, 0.5)
    stage = ShardedFiles.stage

    def staging(files: ShardedFiles) -> None:
        stage(files)
        staged.extend(tensor.data_ptr() for _, _, (_, tensors) in files._writer.write_buckets for _, tensor in tensors)

    monkeypatch.setattr(ShardedFiles, "stage", staging)
    path = ShardedSave(
        tmp_path, policy.chunks, policy.optimizer, {"step": 2}, {}, copies=copies, in_background=in_background
    ).complete()
    assert addresses and {place: tensor.data_ptr() for place, tensor in copies._tensors.items()} == addresses
    assert sorted(staged) == sorted(addresses.values())
    fill(policy, 0.25)
    load_checkpoint(path, policy.chunks, policy.optimizer)
    assert values(policy) == {0.5}


def test_reserved_host_memory_is_all_that_a_save_fills(policy, tmp_path, monkeypatch) -> None:
    copies, may_fill, fill_memory = HostCopies(), threading.Event(), HostCopies._fill

    def late(self: HostCopies, wanted: Any) -> None:
        may_fill.wait()
        fill_memory(self, wanted)

    monkeypatch.setattr(HostCopies, "_fill", late)
    copies.reserve(state_to_save(policy.chunks, policy.optimizer))
    assert not copies._tensors, "it returns before the memory is there"
    may_fill.set()
    copies.wait()
    addresses = {place: tensor.data_ptr() for place, tensor in copies._tensors.items()}
    fill(policy, 0.5)
    path = begin(policy, tmp_path, 1, copies).complete()
    assert addresses and {place: tensor.data_ptr() for place, tensor in copies._tensors.items()} == addresses
    fill(policy, 0.25)
    load_checkpoint(path, policy.chunks, policy.optimizer)
    assert values(policy) == {0.5}


def test_a_reservation_ends_in_the_middle_and_leaves_no_thread(policy, monkeypatch) -> None:
    copies, before, asked = HostCopies(), set(threading.enumerate()), threading.Event()
    memory = HostCopies._memory

    def slow(self: HostCopies, *wanted: Any) -> Any:
        asked.set()
        assert self._closed.wait(60)
        return memory(self, *wanted)

    monkeypatch.setattr(HostCopies, "_memory", slow)
    copies.reserve(state_to_save(policy.chunks, policy.optimizer))
    assert asked.wait(60)
    copies.close()
    assert set(threading.enumerate()) <= before and len(copies._tensors) == 1


def test_too_little_room_is_told_before_anything_is_written(policy, tmp_path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(UserError, match=r"it takes \d.* and its file system has .* free") as error:
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
        assert newest_checkpoint(disk, checksums=True, say=pytest.fail) == (good, {"seen": 4, "step": 1})
        load_checkpoint(good, policy.chunks, policy.optimizer)


def test_the_estimate_is_what_a_checkpoint_takes(policy, tmp_path, monkeypatch) -> None:
    asked: list[int] = []
    described = save_module.described_bytes
    monkeypatch.setattr(save_module, "described_bytes", lambda count: asked.append(count) or described(count))
    monkeypatch.setattr(save_module, "_free_bytes", lambda path: 0)
    with pytest.raises(UserError):
        save(policy, tmp_path, 1)
    monkeypatch.undo()
    path = save(policy, tmp_path, 1)
    taken = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert taken <= asked[0] <= taken + (1 << 20)
    assert sum(p.numel() for chunk in policy.chunks for p in chunk.parameters()) * 12 <= asked[0]
    assert torch.is_grad_enabled()
