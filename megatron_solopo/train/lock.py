"""Lets only one run at a time use a run directory."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from megatron_solopo.errors import UserError
from megatron_solopo.parallel.agreement import on_rank_0

LOCK = ".lock"
_JOB = ", SLURM job {} after {} restarts"
_WAIT_SECONDS = 10.0
_POLL_SECONDS = 0.2


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Lock the directory while the body runs. All ranks enter it together; rank 0 holds the lock.

    It is a POSIX record lock. The kernel frees it when the process ends in whatever way, and forked processes do not
    inherit it. On NFS it works between nodes, unless mounted with `nolock` or `local_lock`. NFS frees the lock of a
    dead node when its lease ends, which may take minutes.

    A process that is just ending is waited for up to 10 seconds. If the holder is an earlier start of the same SLURM
    job, it must be dead, because SLURM has started the job again. Its lock is taken over after that time.

    A run that is refused before it has written anything leaves no directory behind.

    Raises UserError on every rank, naming the process that holds the lock.
    """
    is_new = not run_dir.exists()
    held: list[TextIO] = []
    on_rank_0(lambda: held.append(_acquire(run_dir, _WAIT_SECONDS)))
    try:
        yield
    finally:
        for stream in held:
            if is_new and list(run_dir.iterdir()) == [run_dir / LOCK]:
                (run_dir / LOCK).unlink()
                run_dir.rmdir()
            stream.close()


def _acquire(run_dir: Path, wait_seconds: float) -> TextIO:
    file = run_dir / LOCK
    until = time.monotonic() + wait_seconds
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+", encoding="utf-8")
        if not _try_lock(stream):
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
        elif file.exists() and os.path.samestat(file.stat(), os.fstat(stream.fileno())):
            break
        else:  # its last holder has removed the file since it was opened here
            stream.close()
            continue
        if time.monotonic() > until:
            if not _is_our_former_self(holder):
                raise UserError(
                    f"{run_dir}: {holder} trains in it; end that first, or set run_dir to another directory. If it is "
                    f"known to be dead, its node's lock has not been freed yet: remove {file}"
                )
            file.unlink(missing_ok=True)  # the lock belongs to this file, not to its name
        time.sleep(_POLL_SECONDS)
    stream.truncate(0)
    job = _JOB.format(*_job()) if "SLURM_JOB_ID" in os.environ else ""
    stream.write(f"process {os.getpid()} on {socket.gethostname()}{job} ({dist.get_world_size()} ranks)\n")
    stream.flush()
    return stream


def _try_lock(stream: TextIO) -> bool:
    """Whether the lock is ours now; on a file system without locks it always is."""
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            stream.close()
            raise
    return True


def _job() -> tuple[str, int]:
    """The SLURM job that this process belongs to, and how often it was queued again."""
    return os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _is_our_former_self(holder: str) -> bool:
    """Whether an earlier start of this SLURM job holds the lock; it is dead, or SLURM had not started the job again."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    job, restarts = _job()
    return any(_JOB.format(job, earlier) in holder for earlier in range(restarts))
