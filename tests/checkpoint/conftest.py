"""A model and its import, and copies of both to be damaged."""

import shutil
from pathlib import Path

import pytest

from megatron_solopo.checkpoint.convert import import_model
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
