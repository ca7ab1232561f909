"""Runs that save in the background, die inside a save, or find a damaged checkpoint: real processes, two ranks."""

import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_solopo.config import parse_config
from megatron_solopo.errors import UserError
from megatron_solopo.train import lock, trainer
from megatron_solopo.train.trainer import train
from tests.distributed import run_distributed
from tests.tiny_models import make_model
from tests.train.runs import make_inputs, recorded

STEPS = 4
CONFIG: dict[str, Any] = {
    "data": {"max_tokens_per_pack": 400},
    "training": {"global_batch_size": 4, "max_steps": STEPS, "eval_steps": 2},
    "optimizer": {"lr": 1e-3},
    "checkpoint": {"save_steps": 1},
    "parallel": {"tensor_model_parallel_size": 2},
}


def launch(
    folder: Path, run: str, *, die_in: str = "", long_evaluation: float = 120.0, **sections: dict[str, Any]
) -> str:
    """Train on two processes; returns what rank 0 said, or the error that both ended with.

    Args:
        die_in: `module:function:n`: rank 0 gets SIGKILL where it calls that function for the n-th time.
        long_evaluation: seconds above which an evaluation counts as long.
    """
    config = CONFIG | {
        "run_dir": folder / run,
        "model": {"path": folder / "model"},
        "data": CONFIG["data"] | {"path": folder / "prepared"},
        "reference": {"cache": folder / "reference"},
    }
    config |= {name: config[name] | section for name, section in sections.items()}
    said: list[str] = run_distributed(run_one, 2, config, die_in, long_evaluation)
    return said[0]


def run_one(config: dict[str, Any], die_in: str, long_evaluation: float) -> str:
    """On every rank."""
    said = io.StringIO()
    long = mock.patch.object(trainer, "_LONG_EVALUATION_SECONDS", long_evaluation)
    with contextlib.redirect_stdout(said), mock.patch.object(lock, "_WAIT_SECONDS", 0.5), long, dying(die_in):
        try:
            train(parse_config(config, source="test"))
        except UserError as error:
            return f"error: {error}"
    return said.getvalue()


def dying(die_in: str) -> contextlib.AbstractContextManager[Any]:
    if not die_in or os.environ["RANK"] != "0":
        return contextlib.nullcontext()
    module, name, number = die_in.split(":")
    *owners, name = name.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), []

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    return mock.patch.object(owner, name, killed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("runs"))
    launch(path, "whole")
    return path


def stored(checkpoint: Path) -> dict[Any, Any]:
    """Every tensor of a checkpoint as its bytes, and every object by value: dictionaries may be in another order."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    found = {}
    for index, info in metadata.storage_data.items():
        with (checkpoint / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            content = stream.read(info.length)
        is_tensor = isinstance(metadata.state_dict_metadata[index.fqn], TensorStorageMetadata)
        found[index] = content if is_tensor else torch.load(io.BytesIO(content), weights_only=True)
    assert sum(isinstance(each, bytes) for each in found.values()) > 30
    return found


def copy(folder: Path, run: str, until: int) -> Path:
    """The run directory as it was after step `until`, one step further than its newest checkpoint."""
    shutil.copytree(folder / "whole", folder / run)
    for step in range(until, STEPS + 1):
        shutil.rmtree(folder / run / "checkpoints" / f"iter_{step:07d}")
    (folder / run / "checkpoints" / "latest").write_text(f"iter_{until - 1:07d}\n")
    return folder / run / "checkpoints"


def test_async_saves_are_the_synchronous_ones_bit_by_bit(folder: Path) -> None:
    launch(folder, "async", checkpoint={"async_save": True, "keep_last": 2, "keep_every": 2})
    assert recorded(folder, "async") == recorded(folder, "whole")
    saved = sorted(path.name for path in (folder / "async" / "checkpoints").iterdir())
    assert saved == ["iter_0000002", "iter_0000003", "iter_0000004", "latest"]
    for name in saved[:3]:
        assert stored(folder / "async" / "checkpoints" / name) == stored(folder / "whole" / "checkpoints" / name)


DEATHS = {
    "inside the write": ("megatron_solopo.parallel.megatron_internals:ShardedFiles.write:5", 3),
    "between name and latest": ("megatron_solopo.checkpoint.directory:sync_directory:8", 4),
}


@pytest.mark.parametrize(("where", "mode"), [*((where, False) for where in DEATHS), ("inside the write", True)])
def test_killed_inside_a_save_it_continues_from_the_good_one(where: str, mode: bool, folder: Path) -> None:
    name = f"killed-{list(DEATHS).index(where)}-{mode}"
    die_in, continues_at = DEATHS[where]
    # Whichever is noticed first: that rank 0 is dead, or that rank 1 has lost it.
    with pytest.raises((TimeoutError, RuntimeError), match=r"killed: \[0\]|rank 1 failed(.|\n)*gloo"):
        launch(folder, name, die_in=die_in, checkpoint={"async_save": mode})
    left = sorted(path.name for path in (folder / name / "checkpoints").iterdir())
    assert ("iter_0000003" in left) == (where == "between name and latest"), left
    assert (folder / name / "checkpoints" / "latest").read_text() == "iter_0000002\n"
    said = launch(folder, name, checkpoint={"async_save": mode})
    assert f"at step {continues_at}" in said, said
    assert recorded(folder, name) == recorded(folder, "whole")
    last = f"checkpoints/iter_{STEPS:07d}"
    assert stored(folder / name / last) == stored(folder / "whole" / last)
    assert not [path.name for path in (folder / name / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_pipeline_that_is_killed_in_a_long_evaluation_has_lost_no_step(folder: Path) -> None:
    sections: dict[str, Any] = {"parallel": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}}
    # In the background, a save would be complete only after the evaluation.
    sections |= {"checkpoint": {"save_steps": None, "async_save": True}, "long_evaluation": 0.0}
    said = launch(folder, "pipeline", **sections)
    assert said.count("before a long evaluation") == 2 and said.count("(the end;") == 1
    with pytest.raises((TimeoutError, RuntimeError), match=r"killed: \[0\]|rank 1 failed(.|\n)*gloo"):
        launch(folder, "in-evaluation", die_in="megatron_solopo.train.trainer:run_single_pass:1", **sections)
    said = launch(folder, "in-evaluation", **sections)
    assert "at step 2" in said, "it completes the evaluation"
    assert recorded(folder, "in-evaluation") == recorded(folder, "pipeline")
    last = f"checkpoints/iter_{STEPS:07d}"
    assert stored(folder / "in-evaluation" / last) == stored(folder / "pipeline" / last)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-len(content) // 3] ^= 8
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_told_and_the_one_before_continues(folder: Path) -> None:
    name = "damaged"
    checkpoints = copy(folder, name, until=4)
    flip(checkpoints / "iter_0000003" / "__1_0.distcp")
    said = launch(folder, name)
    assert f"damaged: {checkpoints / 'iter_0000003' / '__1_0.distcp'}: " in said and "at step 3" in said
    assert (checkpoints / "damaged_iter_0000003").is_dir()
    assert recorded(folder, name) == recorded(folder, "whole")
    events = EventAccumulator(str(folder / name / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, STEPS + 1)), "each step once"


def test_another_reference_is_refused(folder: Path) -> None:
    copy(folder, "other-reference", until=3)
    make_model(folder / "other_model", "qwen2_tied", seed=3)
    said = launch(
        folder,
        "other-reference",
        reference={"model_path": folder / "other_model", "cache": folder / "other"},
    )
    assert said.startswith("error: ") and "iter_0000002: a run keeps" in said
    assert f"now reference.model_path={folder / 'other_model'} holds other weights; " in said
    assert not (folder / "other").exists(), "refused before the reference pass"


def test_two_runs_do_not_share_a_directory(folder: Path) -> None:
    copy(folder, "shared", until=3)
    file = str(folder / "shared" / ".lock")
    code = f"import fcntl, time; f = open({file!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True)"
    with subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(120)"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        said = launch(folder, "shared")
        holder.kill()
    assert said.startswith("error: ") and "trains in it; end that first" in said
    assert not (folder / "shared" / "checkpoints" / "iter_0000003").exists()
