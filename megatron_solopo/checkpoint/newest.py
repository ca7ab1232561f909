"""Finds the checkpoint that a run continues from: the newest whose every file is as it was written."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_solopo.checkpoint.directory import LATEST, candidates, read_pointer, recover, set_aside, write_pointer
from megatron_solopo.checkpoint.manifest import Entry, damages, edited, read_manifest, share, shown
from megatron_solopo.checkpoint.pending import TRAINER_STATE
from megatron_solopo.parallel.agreement import on_rank_0


def newest_checkpoint(root: Path, *, checksums: bool, say: Callable[[str], Any]) -> tuple[Path, dict[str, Any]] | None:
    """Path and trainer state of the newest good checkpoint, or None where nothing was saved yet.

    Called by all ranks together; each reads its share of the files. A damaged checkpoint is told by the files that
    are, and renamed to `damaged_iter_...`, but only where an older one is good.

    Args:
        checksums: read every file whole; False: compare sizes alone.
        say: told, on rank 0, of every damaged checkpoint in a line.

    Raises ValueError on every rank, and renames nothing, if there are checkpoints but none of them is good.
    """
    damaged: dict[Path, str] = {}
    for path in on_rank_0(lambda: _candidates(root)):
        problem = _problem(path, checksums)
        if problem is None:
            on_rank_0(lambda path=path: _turn_to(path, damaged, say))
            return path, on_rank_0(lambda path=path: _read_state(path))
        damaged[path] = problem
    if damaged:
        raise ValueError(
            f"{root}: holds no checkpoint that is whole: {'; '.join(damaged.values())}. Bring one back, or set run_dir "
            "to another directory to start anew"
        )
    return None


def _candidates(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    recover(root)
    return candidates(root)


def _problem(path: Path, checksums: bool) -> str | None:
    """What is wrong with a checkpoint, the same on every rank."""
    listed, problem = on_rank_0(lambda: _listed(path))
    if problem is not None:
        return str(problem)
    found: list[Any] = [None] * dist.get_world_size()
    mine = share(listed, dist.get_rank(), dist.get_world_size())
    dist.all_gather_object(found, damages(path, mine, checksums=checksums))
    return shown([damage for each in found for damage in each]) or None


def _listed(path: Path) -> tuple[dict[str, Entry], str | None]:
    if not path.is_dir():
        return {}, f"{path}: no such directory, but {path.parent / LATEST} names it"
    try:
        return read_manifest(path), None
    except ValueError as error:
        return {}, str(error)


def _turn_to(path: Path, damaged: Mapping[Path, str], say: Callable[[str], Any]) -> None:
    """On rank 0: let `latest` name a good checkpoint before the damaged ones lose their names."""
    if read_pointer(path.parent, LATEST) != path.name:
        write_pointer(path.parent, LATEST, path.name)
    for each, problem in damaged.items():
        kept = f"it is kept as {set_aside(each).name}; " if each.exists() else ""
        say(f"warning: checkpoint {each.name} is damaged: {problem}; {kept}continuing from {path.name}")
    if changed := edited(path, read_manifest(path)):
        say(f"warning: checkpoint {path.name}: changed since it was saved: {', '.join(changed)}")


def _read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
    return state
