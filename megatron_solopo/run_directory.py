"""The files of a run directory, and the model that a path names.

config.yaml      the resolved configuration, written when training starts
metrics.jsonl    one object per step
checkpoints/     iter_0000010, ..., and `latest`, which holds the name of the newest complete one
evaluation/      results of `evaluate`
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_solopo.architecture.model_directory import CONFIG, check_megatron_checkpoint, is_megatron_checkpoint
from megatron_solopo.errors import UserError

RUN_CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"
SOURCE_METRIC = re.compile("(?P<held_out>eval_)?source/(?P<source>[^/]+)/(?P<metric>.+)")
"""Name of a metric of one source of rows in metrics.jsonl; with `eval_`, on held-out rows."""
_LATEST, _STEP = "latest", "iter_"


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, and the run that made it, if any."""

    path: Path
    """Hugging Face directory or Megatron checkpoint."""
    run_dir: Path | None = None
    step: int | None = None

    @property
    def name(self) -> str:
        """A short name for files: that of the directory."""
        return self.path.resolve().name


def find_subject(path: Path, option: str) -> Subject:
    """Find the model that `path` names: a run (its newest checkpoint), a checkpoint, or a Hugging Face directory.

    Raises UserError, naming the command's `option`, if `path` is none of them.
    """
    if (path / CHECKPOINTS).is_dir() and not is_megatron_checkpoint(path):
        path = _newest(path, option)
    if is_megatron_checkpoint(path):
        return _of_run(path)
    if not (path / CONFIG).is_file():
        check_megatron_checkpoint(path, option)
    return Subject(path)


def _newest(run_dir: Path, option: str) -> Path:
    pointer = run_dir / CHECKPOINTS / _LATEST
    if not pointer.is_file():
        raise UserError(f"{option}={run_dir}: the run has saved no checkpoint yet: {pointer} is missing")
    path = run_dir / CHECKPOINTS / pointer.read_text(encoding="utf-8").strip()
    check_megatron_checkpoint(path, option)
    return path


def _of_run(path: Path) -> Subject:
    folder, step = path.absolute().parent, path.absolute().name.removeprefix(_STEP)
    if folder.name != CHECKPOINTS or not (folder.parent / RUN_CONFIG).is_file() or not step.isdigit():
        return Subject(path)
    # Keep a relative path relative, so that files and messages show it as the user wrote it.
    run_dir = folder.parent if path.parent.name != CHECKPOINTS else path.parent.parent
    return Subject(path, run_dir, int(step))
