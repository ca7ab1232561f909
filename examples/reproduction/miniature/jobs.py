"""What a worker process does, each job in a log of its own. Heavy libraries are imported by the jobs."""

import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any


def make_bases(work: Path, seed: int, strengths: tuple[int, ...]) -> None:
    """The base models of a seed."""
    with _log(work / f"seed{seed}" / "base.log"):
        from miniature.base import train_base
        from miniature.runs import base_directory

        train_base({strength / 100: base_directory(work, strength, seed) for strength in strengths}, seed)


def make_data(work: Path, seed: int, strength: int) -> None:
    """The pairs of a base model."""
    with _log(work / f"seed{seed}" / f"data{strength}.log"):
        from miniature.runs import prepare_data

        prepare_data(work, strength, seed)


def make_run(work: Path, run: Any) -> dict[str, Any]:
    """A run's line of `runs.jsonl`."""
    with _log(work / "runs" / f"{run.name}.log"):
        from miniature.runs import execute

        started = time.monotonic()
        found = execute(work, run)
        return found | {"seconds": round(time.monotonic() - started, 1)}


class _log:
    """Send what a job prints into a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("w", encoding="utf-8")
        self._redirections = (redirect_stdout(self._stream), redirect_stderr(self._stream))

    def __enter__(self) -> None:
        for redirection in self._redirections:
            redirection.__enter__()

    def __exit__(self, *error: Any) -> None:
        for redirection in self._redirections:
            redirection.__exit__(*error)
        self._stream.close()
