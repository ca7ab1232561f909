"""The directory that holds a run's checkpoints: names, pointers, and what an interruption may leave.

checkpoints/iter_0000010/            complete: it got its name last
checkpoints/latest                   the name of the one that a run continues from
checkpoints/.iter_0000020.incomplete being written
checkpoints/.latest.next             written before iter_0000020 gets its name, renamed to `latest` right after
checkpoints/damaged_iter_0000010     found damaged, kept for a person to look at
One process alone changes it: rank 0 of the run that holds the run directory's lock.

Which checkpoints stay, and which one is the best.

checkpoints/best    the name of the best saved so far, by `checkpoint.best_metric`

Finds the checkpoint that a run continues from: the newest whose every file is as it was written.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_solopo.checkpoint.manifest import (
    FileEntry,
    damages,
    edited,
    read_manifest,
    share,
    shown,
    sync_directory,
    sync_file,
)
from megatron_solopo.config import CheckpointConfig
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, remove, replace
from megatron_solopo.parallel.agreement import on_rank_0

LATEST = "latest"
TRAINER_STATE = "trainer.json"
_NEXT = ".latest.next"
_NAME = re.compile(r"iter_(\d{7,})")
_LEFTOVERS = (_NEXT, ".iter_*.incomplete", ".iter_*.deleted", ".iter_*.replaced-*", ".*.incomplete-*")


def checkpoint_name(step: int) -> str:
    """`iter_0000010`."""
    return f"iter_{step:07d}"


def step_of(name: str) -> int:
    """The step in a checkpoint's name, -1 for any other name."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else -1


def temporary_path(root: Path, step: int) -> Path:
    """Where a checkpoint lies until it is complete."""
    return root / f".{checkpoint_name(step)}.incomplete"


def checkpoints(root: Path) -> list[Path]:
    """Those that got their name, newest first."""
    found = [path for path in root.glob("iter_*") if path.is_dir() and step_of(path.name) >= 0]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def read_pointer(root: Path, pointer: str) -> str | None:
    """The name that `latest` holds, or None where there is no such file."""
    file = root / pointer
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def write_pointer(root: Path, pointer: str, name: str) -> None:
    """Point to another checkpoint."""
    with atomic_path(root / pointer) as temporary:
        temporary.write_text(name + "\n", encoding="utf-8")
        sync_file(temporary)
    sync_directory(root)


def publish(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name, then point `latest` to it; see `recover` for a death in between."""
    root = final.parent
    write_pointer(root, _NEXT, final.name)
    replace(temporary, final)
    sync_directory(root)
    (root / _NEXT).replace(root / LATEST)
    sync_directory(root)


def recover(root: Path) -> None:
    """Clean up behind a process that died: point to what it completed, remove what it did not."""
    following = read_pointer(root, _NEXT)
    if following is not None and step_of(following) >= 0:
        # It was complete when this was written.
        if (temporary := temporary_path(root, step_of(following))).exists():
            replace(temporary, root / following)
        (root / _NEXT).replace(root / LATEST)
    for pattern in _LEFTOVERS:
        for leftover in root.glob(pattern):
            remove(leftover)


def candidates(root: Path) -> list[Path]:
    """What a run may continue from, best first: the one that `latest` names, then the older ones.

    Newer ones, which a person has turned back from by writing another name into `latest`, are no candidates.
    """
    name = read_pointer(root, LATEST)
    complete = checkpoints(root)
    if name is None or step_of(name) < 0:
        return complete
    return [root / name, *(path for path in complete if step_of(path.name) < step_of(name))]


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, if it is there at all, so that no run takes it again; returns its new path."""
    new, count = path.with_name(f"damaged_{path.name}"), 1
    while new.exists():
        count += 1
        new = path.with_name(f"damaged_{path.name}.{count}")
    if path.exists():
        path.rename(new)
    return new


BEST = "best"


def check_best_metric(config: CheckpointConfig, names: Iterable[str], evaluates: bool) -> None:
    """Raise ValueError if `best_metric` is none of the run's metrics: `names`, and those of the evaluation."""
    legal = list(names)
    legal += [f"eval_{name}" for name in legal] if evaluates else []
    if config.best_metric is not None and config.best_metric not in legal:
        hint = "" if evaluates else "; those that begin with eval_ need training.eval_steps"
        raise UserError(
            f"checkpoint.best_metric={config.best_metric} is no metric of this run; legal: {', '.join(legal)}{hint}"
        )


def tidy(root: Path, config: CheckpointConfig) -> None:
    """On rank 0, after a save: point to the best, and remove what need not be kept.

    What `latest` and `best` name stays. A checkpoint steps aside under a hidden name before it is removed, so that none
    that bears its name is ever half there.
    """
    newest = read_pointer(root, LATEST)
    if config.best_metric is not None and newest is not None:
        _rank(root, root / newest, config.best_metric, config.greater_is_better)
    if config.keep_last is None:
        return
    pinned = {read_pointer(root, BEST), newest}
    # Those that a person has turned back from are newer: they do not count, and are not this run's to remove.
    own = [path for path in checkpoints(root) if step_of(path.name) <= step_of(newest or "")]
    for path in own[config.keep_last :]:
        if path.name in pinned or (config.keep_every is not None and step_of(path.name) % config.keep_every == 0):
            continue
        aside = path.with_name(f".{path.name}.deleted")
        remove(aside)
        path.rename(aside)
        remove(aside)


def _rank(root: Path, path: Path, metric: str, greater_is_better: bool) -> None:
    value, name = _value(path, metric), read_pointer(root, BEST)
    best = None if name is None else _value(root / name, metric)
    if value is not None and (best is None or (value > best if greater_is_better else value < best)):
        write_pointer(root, BEST, path.name)


def _value(path: Path, metric: str) -> float | None:
    """What a checkpoint's step measured; None where that step was not evaluated, or the checkpoint is gone."""
    try:
        state: dict[str, Any] = json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    value = (state.get("metrics") or {}).get(metric)
    return value if value is not None and math.isfinite(value) else None


def newest_checkpoint(root: Path, *, checksums: bool, say: Callable[[str], Any]) -> tuple[Path, dict[str, Any]] | None:
    """Path and trainer state of the newest good checkpoint, or None where nothing was saved yet.

    Called by all ranks together; each reads its share of the files. A damaged checkpoint is told by the files that
    are, and renamed to `damaged_iter_...`, but only where an older one is good.

    Args:
        checksums: read every file whole; False: compare sizes alone.
        say: told, on rank 0, of every damaged checkpoint in a line.

    Raises UserError on every rank, and renames nothing, if there are checkpoints but none of them is good.
    """
    damaged: dict[Path, str] = {}
    for path in on_rank_0(lambda: _candidates(root)):
        problem = _problem(path, checksums)
        if problem is None:
            on_rank_0(lambda path=path: _turn_to(path, damaged, say))
            return path, on_rank_0(lambda path=path: _read_state(path))
        damaged[path] = problem
    if damaged:
        raise UserError(
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


def _listed(path: Path) -> tuple[dict[str, FileEntry], str | None]:
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
