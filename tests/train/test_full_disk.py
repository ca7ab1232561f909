"""Runs whose disk gets full: a periodic save warns and the run goes on, the last save ends it. Two real processes."""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_solopo.checkpoint import save as save_module
from megatron_solopo.checkpoint.save import ShardedSave
from megatron_solopo.errors import OutOfSpaceError
from megatron_solopo.files import read_jsonl
from megatron_solopo.train import saving
from megatron_solopo.train.metrics import MetricsWriter
from megatron_solopo.train.trainer import train
from tests.disks import mounted
from tests.distributed import run_distributed
from tests.train.runs import at_call, make_inputs, recorded, small_config
from tests.train.test_saving import stored

TP2 = {"tensor_model_parallel_size": 2}
STEPS, MANY, NEVER = 4, 10, 100


def run(
    disk: Path, name: str, during: contextlib.AbstractContextManager[Any], *, steps: int = STEPS, **checkpoint: Any
) -> str:
    """On every rank: a run whose steps are all saved; returns what this rank said, and the error if one ended it."""
    config = small_config(
        disk,
        name,
        TP2,
        training={"global_batch_size": 4, "max_steps": steps},
        model={"path": disk.parent / "model"},
        data={"path": disk.parent / "prepared", "max_tokens_per_pack": 400},
        objective={"loss_type": "simpo"},
        reference={},
        checkpoint={"save_steps": 1, **checkpoint},
        logging={"tensorboard": True},
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said), during:
        try:
            train(config)
        except OutOfSpaceError as error:
            print(f"error: {error}")
    dist.barrier()
    if dist.get_rank() == 0:
        (disk / "other").unlink(missing_ok=True)
    dist.barrier()
    return said.getvalue()


def fill(disk: Path, room_kib: int = 0) -> None:
    """Let another program take the disk, up to the last block or a rest."""
    with (disk / "other").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        stream.write(bytes(max(0, shutil.disk_usage(disk).free - (room_kib << 10))))
        while not room_kib:
            stream.write(bytes(512))


METRICS, SAVE = (MetricsWriter, "on_step_end"), (saving, "ShardedSave")


@contextlib.contextmanager
def full_between(
    disk: Path, call: tuple[Any, str], first: int, end: int, *, room_kib: int = 0, is_seen: bool = True
) -> Iterator[None]:
    """The disk is full from before one call to before another, on rank 0.

    Args:
        is_seen: the file system says how full it is; a quota would not.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(at_call(*call, first, 0, lambda: fill(disk, room_kib)))
        stack.enter_context(at_call(*call, end, 0, lambda: (disk / "other").unlink()))
        if not is_seen:
            stack.enter_context(mock.patch.object(save_module, "_free_bytes", lambda path: 1 << 40))
        yield


@contextlib.contextmanager
def full_for_one_file_of_rank_1(number: int) -> Iterator[None]:
    """What rank 1 writes of its n-th checkpoint meets ENOSPC; rank 0 writes all of its files."""

    def planned(save: ShardedSave) -> None:
        (save._folder / "__1_0.distcp").symlink_to("/dev/full")

    write: Callable[[ShardedSave], Any] = ShardedSave._write
    calls = 0

    def counting(self: ShardedSave) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and dist.get_rank() == 1:
            planned(self)
        return write(self)

    with mock.patch.object(ShardedSave, "_write", counting):
        yield


def run_all(folder: Path, disk: Path | None) -> dict[str, str]:
    """On every rank: what each run said."""
    found = {"plain": run(folder / "plain", "plain", contextlib.nullcontext())}
    for background in (False, True):
        one_rank = full_for_one_file_of_rank_1(2)
        found[f"rank 1, {background}"] = run(folder / "plain", f"one-{background}", one_rank, async_save=background)
    if disk is None:
        return found
    for background in (False, True):
        name = f"seen-{background}"
        found[name] = run(disk, name, full_between(disk, SAVE, 2, 3), async_save=background)
        name = f"unseen-{background}"
        unseen = full_between(disk, SAVE, 2, 3, room_kib=180, is_seen=False)
        found[name] = run(disk, name, unseen, async_save=background)
    found["first"] = run(disk, "first", full_between(disk, METRICS, 1, NEVER, room_kib=100))
    found["last"] = run(disk, "last", full_between(disk, METRICS, STEPS, NEVER, room_kib=100))
    found["continued"] = run(disk, "last", contextlib.nullcontext())
    # So many steps that their lines need another block of the disk.
    found["waiting"] = run(disk, "waiting", full_between(disk, METRICS, 2, MANY), steps=MANY)
    found["no room"] = run(disk, "no room", full_between(disk, METRICS, 2, NEVER), steps=MANY)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("full"), eval_count=0)
    (path / "plain").mkdir()
    return path


@pytest.fixture(scope="module")
def mount(folder: Path) -> Iterator[Path | None]:
    """A small file system of its own, or None where this process may not mount one."""
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(mounted(folder / "disk", "size=24m"))
        except pytest.skip.Exception:
            yield None


@pytest.fixture(scope="module")
def found(folder: Path, mount: Path | None) -> list[dict[str, str]]:
    return run_distributed(run_all, 2, folder, mount)


@pytest.fixture
def disk(mount: Path | None) -> Path:
    if mount is None:
        pytest.skip("mounting a small tmpfs needs root with CAP_SYS_ADMIN")
    return mount


def saved(run_dir: Path) -> list[str]:
    """Everything among the checkpoints, hidden and half-written ones too."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def assert_went_on(run_dir: Path, plain: Path, steps: list[int]) -> None:
    """The checkpoints of these steps, no trace of another, every step's metrics, and the undisturbed run's end."""
    assert saved(run_dir) == [*(f"iter_{step:07d}" for step in steps), "latest"]
    assert (run_dir / "checkpoints" / "latest").read_text() == f"iter_{STEPS:07d}\n"
    assert recorded(run_dir.parent, run_dir.name) == recorded(plain.parent, plain.name)
    last = f"checkpoints/iter_{STEPS:07d}"
    assert stored(run_dir / last) == stored(plain / last)


@pytest.mark.parametrize("background", [False, True])
def test_one_rank_whose_disk_is_full_is_a_warning_on_all(folder: Path, found: Any, background: bool) -> None:
    said, other = (rank[f"rank 1, {background}"] for rank in found)
    run_dir = folder / "plain" / f"one-{background}"
    assert_went_on(run_dir, folder / "plain" / "plain", [1, 3, 4])
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert warning.startswith(f"warning: {run_dir / 'checkpoints' / 'iter_0000002'} was not saved: ")
    assert "No space left on device" in warning and "; the run goes on, and iter_0000001 is the one" in warning
    assert other == "", "one rank tells it"


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("case", ["seen", "unseen"])
def test_a_disk_that_is_full_at_one_save_is_a_warning(
    folder: Path, disk: Path, found: Any, case: str, background: bool
) -> None:
    run_dir = disk / f"{case}-{background}"
    assert_went_on(run_dir, folder / "plain" / "plain", [1, 3, 4])
    # The file of metrics may need another block of the disk at the same time: that has a warning of its own.
    of_a_save = f"warning: {run_dir / 'checkpoints'}"
    (warning,) = [line for line in found[0][run_dir.name].splitlines() if line.startswith(of_a_save)]
    assert "; the run goes on, and iter_0000001 is the one to continue from" in warning
    reason = "there is too little room" if case == "seen" else "No space left on device"
    assert f"iter_0000002 was not saved: {reason} (it takes " in warning and " free; make room" in warning


def test_without_an_older_checkpoint_the_run_ends(disk: Path, found: Any) -> None:
    first, second = (rank["first"].splitlines()[-1] for rank in found)
    assert first == second and first.startswith(
        f"error: {disk / 'first' / 'checkpoints' / 'iter_0000001'} was not saved: "
    )
    assert saved(disk / "first") == []


def test_a_last_save_that_fails_ends_the_run(folder: Path, disk: Path, found: Any) -> None:
    first, second = (rank["last"].splitlines()[-1] for rank in found)
    assert first == second and "iter_0000004 was not saved: there is too little room (it takes " in first
    assert "at step 4" in found[0]["continued"]
    assert_went_on(disk / "last", folder / "plain" / "plain", [2, 3, 4])


def test_metrics_wait_for_room_and_no_checkpoint_is_ahead_of_them(disk: Path, found: Any) -> None:
    for name in ("waiting", "no room"):
        file = disk / name / "metrics.jsonl"
        said = found[0][name].splitlines()
        assert f"warning: {file}: No space left on device; the lines from this step on wait in memory for room" in said
        ahead = f"{file}: No space left on device; no checkpoint is saved before the metrics"
        assert f"warning: {ahead}; the run goes on, and iter_0000001 is the one to continue from" in said
        steps = [step["step"] for step in read_jsonl(file)]
        assert steps == list(range(1, len(steps) + 1)) and file.read_text().endswith("\n")
        if name == "waiting":
            assert len(steps) == MANY and saved(disk / name) == ["iter_0000001", f"iter_{MANY:07d}", "latest"]
        else:
            assert len(steps) < MANY and saved(disk / name) == ["iter_0000001", "latest"]
            assert [rank[name].splitlines()[-1] for rank in found] == [f"error: {ahead}"] * 2
