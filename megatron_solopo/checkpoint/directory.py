"""The directory that holds a run's checkpoints: names and pointers, what stays, and which one a run continues from.

    checkpoints/iter_0000010/            a complete checkpoint; it gets this name last
    checkpoints/latest                   the name of the checkpoint that a run continues from
    checkpoints/best                     the name of the best one saved so far, by `checkpoint.best_metric`
    checkpoints/.iter_0000020.incomplete a checkpoint that is being written
    checkpoints/.latest.next             written before iter_0000020 gets its name, renamed to `latest` right after
    checkpoints/damaged_iter_0000010     found damaged, kept for a person to look at

Only one process changes this directory: rank 0 of the run that holds the run directory's lock.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_solopo.checkpoint.manifest import (
    FileEntry,
    damages,
    edited,
    file_shares,
    read_manifest,
    shown,
    sync_directory,
    sync_file,
)
from megatron_solopo.config import CheckpointConfig
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, remove, replace
from megatron_solopo.parallel.agreement import on_rank_0, over_ranks

LATEST, BEST = "latest", "best"
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
    """The path of a checkpoint until it is complete."""
    return root / f".{checkpoint_name(step)}.incomplete"


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints, newest first."""
    found = [path for path in root.glob("iter_*") if path.is_dir() and step_of(path.name) >= 0]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def read_pointer(root: Path, pointer: str) -> str | None:
    """The checkpoint's name in the file `pointer` (`latest` or `best`), or None if there is no such file."""
    file = root / pointer
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def write_pointer(root: Path, pointer: str, name: str) -> None:
    """Let the file `pointer` name another checkpoint."""
    with atomic_path(root / pointer) as temporary:
        temporary.write_text(name + "\n", encoding="utf-8")
        sync_file(temporary)
    sync_directory(root)


def publish(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name, then let `latest` name it; `recover` completes it after a death between."""
    root = final.parent
    write_pointer(root, _NEXT, final.name)
    replace(temporary, final)
    sync_directory(root)
    (root / _NEXT).replace(root / LATEST)
    sync_directory(root)


def recover(root: Path) -> None:
    """Clean up after a process that died: publish the checkpoint that it had completed, remove what is incomplete."""
    announced = read_pointer(root, _NEXT)
    if announced is not None and step_of(announced) >= 0:
        # The checkpoint was complete when this name was written.
        if (temporary := temporary_path(root, step_of(announced))).exists():
            replace(temporary, root / announced)
        if (root / announced).is_dir():  # not so if its rename failed and the save was given up
            (root / _NEXT).replace(root / LATEST)
    for pattern in _LEFTOVERS:
        for leftover in root.glob(pattern):
            remove(leftover)


def candidates(root: Path) -> list[Path]:
    """The checkpoints that a run may continue from, best first: the one that `latest` names, then the older ones.

    A person may write an older name into `latest`. Newer checkpoints are then no candidates.
    """
    name = read_pointer(root, LATEST)
    complete = checkpoints(root)
    if name is None or step_of(name) < 0:
        return complete
    return [root / name, *(path for path in complete if step_of(path.name) < step_of(name))]


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, if it exists, so that no run continues from it; returns its new path."""
    new, count = path.with_name(f"damaged_{path.name}"), 1
    while new.exists():
        count += 1
        new = path.with_name(f"damaged_{path.name}.{count}")
    if path.exists():
        path.rename(new)
    return new


def check_best_metric(config: CheckpointConfig, of_step: Iterable[str], of_evaluation: Sequence[str]) -> None:
    """Raise UserError if `best_metric` is none of the run's metrics.

    Args:
        of_step: metrics of a step.
        of_evaluation: those of the evaluation, without their prefix `eval_`. Empty if the run has no evaluation.
    """
    legal = [*of_step, *(f"eval_{name}" for name in of_evaluation)]
    if config.best_metric is not None and config.best_metric not in legal:
        hint = "" if of_evaluation else "; those that begin with eval_ need training.eval_steps"
        raise UserError(
            f"checkpoint.best_metric={config.best_metric} is no metric of this run; legal: {', '.join(legal)}{hint}"
        )


def tidy(root: Path, config: CheckpointConfig) -> None:
    """On rank 0, after a save: update `best`, and remove the checkpoints that `config` does not keep.

    The checkpoints that `latest` and `best` name stay. A checkpoint gets a hidden name before it is removed, so that no
    incomplete directory ever bears a checkpoint's name.
    """
    newest = read_pointer(root, LATEST)
    if config.best_metric is not None and newest is not None:
        _update_best(root, newest, config.best_metric, config.greater_is_better)
    for path in surplus(root, config):
        hidden = path.with_name(f".{path.name}.deleted")
        remove(hidden)
        path.rename(hidden)
        remove(hidden)


def surplus(root: Path, config: CheckpointConfig) -> list[Path]:
    """The checkpoints that `config` does not keep, newest first."""
    if config.keep_last is None:
        return []
    newest = read_pointer(root, LATEST)
    protected = {read_pointer(root, BEST), newest}
    # Checkpoints newer than `latest` belong to a course that a person has abandoned: this run neither counts nor
    # removes them.
    own = [path for path in checkpoints(root) if step_of(path.name) <= step_of(newest or "")]
    if config.keep_every is not None:
        protected |= {path.name for path in own if step_of(path.name) % config.keep_every == 0}
    return [path for path in own[config.keep_last :] if path.name not in protected]


def _update_best(root: Path, newest: str, metric: str, greater_is_better: bool) -> None:
    best = read_pointer(root, BEST)
    value, best_value = _metric_of(root / newest, metric), None if best is None else _metric_of(root / best, metric)
    if value is not None and (best_value is None or (value > best_value if greater_is_better else value < best_value)):
        write_pointer(root, BEST, newest)


def _metric_of(path: Path, metric: str) -> float | None:
    """A metric of a checkpoint's step; None if that step was not evaluated, or the checkpoint is gone."""
    try:
        state = _trainer_state(path)
    except FileNotFoundError:
        return None
    value = (state.get("metrics") or {}).get(metric)
    return value if value is not None and math.isfinite(value) else None


def newest_checkpoint(
    root: Path,
    *,
    checksums: bool,
    say: Callable[[str], Any],
    accept: Callable[[Path, dict[str, Any]], None] = lambda path, state: None,
) -> tuple[Path, dict[str, Any]] | None:
    """Path and trainer state of the newest good checkpoint, or None if nothing was saved yet.

    All ranks call it together, and each reads its share of the files. A damaged checkpoint is reported with its damaged
    files, and renamed to `damaged_iter_...`, but only if an older one is good.

    Args:
        checksums: read every file whole; False: compare sizes only.
        say: prints a line; called on rank 0 for every damaged or edited checkpoint.
        accept: called with path and trainer state before any checkpoint is renamed. It raises if the checkpoint is
            that of another run.

    Raises UserError on every rank, and renames nothing, if there are checkpoints but none of them is good.
    """
    damaged: dict[Path, str] = {}
    for path in on_rank_0(lambda: _recovered_candidates(root)):
        problem = _find_damage(path, checksums)
        if problem is None:
            state = on_rank_0(partial(_trainer_state, path))
            accept(path, state)
            on_rank_0(partial(_continue_from, path, damaged, say))
            return path, state
        damaged[path] = problem
    if damaged:
        raise UserError(
            f"{root}: holds no checkpoint that is whole: {'; '.join(damaged.values())}. Bring one back, or set run_dir "
            "to another directory to start anew"
        )
    return None


def _recovered_candidates(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    recover(root)
    return candidates(root)


def _find_damage(path: Path, checksums: bool) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; None if it is good."""
    listed: dict[str, FileEntry] = {}
    problem = on_rank_0(lambda: _list_files(path, listed))
    if problem is not None:
        return str(problem)
    found = damages(path, _scattered(listed), checksums=checksums)
    if over_ranks(dist.ReduceOp.SUM, len(found)) == [0]:
        return None
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return shown([damage for each in everyone for damage in each])


def _scattered(listed: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """Give every rank its share of the files that rank 0 has listed.

    The list grows with the number of ranks that saved. So no other rank gets all of it.
    """
    shares = file_shares(listed, dist.get_world_size()) if dist.get_rank() == 0 else None
    own: list[Any] = [None]
    dist.scatter_object_list(own, shares, src=0)
    mine: dict[str, FileEntry] = own[0]
    return mine


def _list_files(path: Path, listed: dict[str, FileEntry]) -> str | None:
    """Put the files of the manifest into `listed`; returns why it cannot be read, None if it can."""
    if not path.is_dir():
        return f"{path}: no such directory, but {path.parent / LATEST} names it"
    try:
        listed.update(read_manifest(path))
    except UserError as error:
        return str(error)
    return None


def _continue_from(path: Path, damaged: Mapping[Path, str], say: Callable[[str], Any]) -> None:
    """On rank 0: let `latest` name a good checkpoint before the damaged ones lose their names."""
    if read_pointer(path.parent, LATEST) != path.name:
        write_pointer(path.parent, LATEST, path.name)
    for each, problem in damaged.items():
        kept = f"it is kept as {set_aside(each).name}; " if each.exists() else ""
        say(f"warning: checkpoint {each.name} is damaged: {problem}; {kept}continuing from {path.name}")
    if changed := edited(path, read_manifest(path)):
        say(f"warning: checkpoint {path.name}: changed since it was saved: {', '.join(changed)}")


def _trainer_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
    return state
