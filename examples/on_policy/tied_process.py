"""Commands that end when the process that started them ends, even by `kill -9`.

A keeper stands between the two: `python tied_process.py SECONDS COMMAND...`. The standard input of the keeper is a
pipe that closes when its starter ends. Then the keeper stops the command and all that it started, by SIGTERM, and after
SECONDS by SIGKILL. It inherits a locked file, and holds that lock until they have ended. A new start can wait for it.
"""

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from megatron_solopo.exits import of_signal

STOP_SECONDS = 300
"""Of a command that is stopped. A training saves a checkpoint in this time."""
_KILL_SECONDS = 60
"""Until the system has removed what was killed, and its memory."""
_POLL_SECONDS = 0.2


@contextmanager
def tied_process(
    command: Sequence[str], lock: Path, log: IO[str], stop_seconds: int = STOP_SECONDS
) -> "Iterator[subprocess.Popen[bytes]]":
    """The process of a command, which has no standard input and writes to `log`.

    It ends with the code of the command. Whatever the command has left is stopped at the end of the block, and killed
    if it has not ended after `stop_seconds`.
    """
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        keeper = subprocess.Popen(
            [sys.executable, __file__, str(stop_seconds), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[held.fileno()],
        )
    assert keeper.stdin is not None
    try:
        yield keeper
    finally:
        keeper.stdin.close()
        keeper.wait()


def have_ended(lock: Path) -> bool:
    """Whether all commands under this lock have ended."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait_for_end(lock: Path, seconds: float = STOP_SECONDS + 60) -> bool:
    """Wait until all commands under this lock have ended, and say whether they have."""
    deadline = time.monotonic() + seconds
    while not have_ended(lock):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _keep(stop_seconds: int, command: Sequence[str]) -> int:
    """Run a command until it or the standard input ends, stop what is left, and return the command's code."""
    # A handler, because the command would inherit that the signal is ignored.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return 127
    while process.poll() is None and not select.select([sys.stdin], [], [], _POLL_SECONDS)[0]:
        pass
    code = process.returncode
    left = _started()
    for each in left:
        _send(each, signal.SIGTERM)
    _wait_for(left, stop_seconds)
    left = [*{*filter(runs, left), *_started()}]
    for each in left:
        _send(each, signal.SIGKILL)
    _wait_for(left, _KILL_SECONDS)
    if code is None:
        return of_signal(signal.SIGTERM)
    return code if code >= 0 else of_signal(-code)


def _started() -> list[psutil.Process]:
    """What runs of the command: descendants, and members of this process group whose parents have ended."""
    own = psutil.Process()
    found = set(own.children(recursive=True))
    for each in psutil.process_iter():
        try:
            if each != own and os.getpgid(each.pid) == os.getpgrp():
                found.add(each)
        except OSError:  # it has ended, or is another user's
            continue
    return [each for each in found if runs(each)]


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended. One that has may stay listed until its parent asks for its code."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_for(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Wait until processes have ended. psutil also waits for their parents to ask for their codes."""
    deadline = time.monotonic() + seconds
    while any(map(runs, processes)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


if __name__ == "__main__":
    sys.exit(_keep(int(sys.argv[1]), sys.argv[2:]))
