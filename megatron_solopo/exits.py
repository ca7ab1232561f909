"""Exit codes of a run, beyond 0 (done), 1 (a bug, with its traceback) and 2 (a mistake, in one line)."""

STOPPED = 85
"""Asked to stop by a signal, and everything is saved: start the same command again and it continues."""
HUNG = 86
"""No progress within the limits of `watchdog.*`: what was not saved is lost; start the same command again."""


def of_signal(number: int) -> int:
    """What a shell shows for a process that signal `number` ended."""
    return 128 + number
