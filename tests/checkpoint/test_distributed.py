"""Megatron checkpoints on one rank: what an interruption leaves behind, and what `latest` may name.

Resuming under every parallel layout is covered by whole runs.
"""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_solopo.checkpoint.directory import newest_checkpoint
from megatron_solopo.checkpoint.load import begin_save, load_checkpoint
from megatron_solopo.checkpoint.save import CheckpointContent, ShardedWrite
from megatron_solopo.train.policy import Policy

MODEL_FILES = {"config.json": b"{}", "additional_chat_templates/tool.jinja": b"x"}


def fill(policy: Policy, value: float) -> None:
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(value)


def values(policy: Policy) -> set[float]:
    return {float(number) for chunk in policy.chunks for p in chunk.parameters() for number in p.detach().unique()}


def save(policy: Policy, root: Path, step: int) -> Path:
    content = CheckpointContent({"step": step, "seen": step * 4}, MODEL_FILES)
    return begin_save(root, policy.chunks, policy.optimizer, content).complete()


def newest(root: Path) -> tuple[Path, dict[str, int]] | None:
    return newest_checkpoint(root, checksums=True, say=pytest.fail)


class Interrupted(BaseException):
    """Like Ctrl-C: no Exception."""


def interrupted_write(self: ShardedWrite) -> None:
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


def test_an_interrupted_checkpoint_leaves_the_one_before(policy, tmp_path, monkeypatch) -> None:
    fill(policy, 0.25)
    first = save(policy, tmp_path, 1)
    fill(policy, 0.5)
    for step in (2, 1):  # a new one, and the same one again
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(ShardedWrite, "write", interrupted_write)
            save(policy, tmp_path, step)
        assert newest(tmp_path) == (first, {"seen": 4, "step": 1})
        assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]
    load_checkpoint(first, policy.chunks, None)
    assert values(policy) == {0.25}


def test_what_an_interruption_left_is_not_in_the_way(policy, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ShardedWrite, "write", interrupted_write)
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
