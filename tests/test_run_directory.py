"""Which model a path names: a run, one of its checkpoints, a checkpoint alone, a Hugging Face directory."""

from pathlib import Path

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.run_directory import Subject, find_subject


def checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    for name in (".metadata", "metadata.json"):
        (path / name).write_text("{}")
    (path / "huggingface").mkdir()
    (path / "huggingface" / "config.json").write_text("{}")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (3, 12):
        checkpoint(tmp_path / "run" / "checkpoints" / f"iter_{step:07d}")
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("iter_0000012\n")
    return tmp_path / "run"


def test_a_run_is_its_newest_checkpoint(run: Path) -> None:
    assert find_subject(run, "--model") == Subject(run / "checkpoints" / "iter_0000012", run, 12)


def test_a_checkpoint_knows_its_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_subject(run / "checkpoints" / "iter_0000003", "--model").step == 3
    monkeypatch.chdir(run / "checkpoints")
    found = find_subject(Path("iter_0000003"), "--model")
    assert found.run_dir is not None and found.run_dir.resolve() == run and found.name == "iter_0000003"


def test_other_models_belong_to_no_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    imported = checkpoint(tmp_path / "imported")
    for path in (tmp_path / "model", imported):
        assert find_subject(path, "--model") == Subject(path)


@pytest.mark.parametrize("spoil", ["latest", "checkpoints/iter_0000012/metadata.json", ""])
def test_what_is_no_model_is_one_line(run: Path, spoil: str) -> None:
    if spoil == "latest":
        (run / "checkpoints" / "latest").unlink()
    elif spoil:
        (run / spoil).unlink()
    path = run if spoil else run / "absent"
    with pytest.raises(UserError) as error:
        find_subject(path, "--model")
    assert str(error.value).startswith("--model=") and "\n" not in str(error.value)
