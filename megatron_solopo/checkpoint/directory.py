"""The directory that holds a run's checkpoints: names, pointers, and what an interruption may leave.

checkpoints/iter_0000010/            complete: it got its name last
checkpoints/latest                   the name of the one that a run continues from
checkpoints/.iter_0000020.incomplete being written
checkpoints/.latest.next             written before iter_0000020 gets its name, renamed to `latest` right after
checkpoints/damaged_iter_0000010     found damaged, kept for a person to look at
One process alone changes it: rank 0 of the run that holds the run directory's lock.
"""

import re
from pathlib import Path

from megatron_solopo.checkpoint.manifest import sync_directory, sync_file
from megatron_solopo.files import atomic_path, remove, replace

LATEST = "latest"
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
