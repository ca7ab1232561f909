"""A model and its import, copies of both to be damaged, and a model in training."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_solopo.checkpoint.conversion import import_model
from megatron_solopo.config import parse_config
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.train.policy import Policy, build_policy
from tests.ranks import layout
from tests.tiny_models import make_model


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model and its import."""
    folder = tmp_path_factory.mktemp("world")
    import_model(make_model(folder / "hf", "qwen2_tied"), folder / "megatron", verification="tensors")
    return folder


@pytest.fixture
def folder(imported: Path, tmp_path: Path) -> Path:
    """Copies to be damaged."""
    return Path(shutil.copytree(imported, tmp_path / "copy"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    path = make_model(tmp_path_factory.mktemp("model"), "qwen2_tied")
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"path": path},
            "data": {"path": "unused", "max_tokens_per_pack": 100},
            "training": {"global_batch_size": 1},
        },
        source="test",
    )
    with layout() as groups:
        policy = build_policy(config, resolve_model(config.model, config.parallel), groups, max_steps=10)
        policy.optimizer.step()  # Adam's state is there from the first step on
        yield policy
