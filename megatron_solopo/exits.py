"""Exit codes of a run, in addition to 0 (success), 1 (a bug, with traceback) and 2 (a mistake, in one line)."""

STOPPED = 85
"""A signal asked the run to stop, and everything is saved. The same command continues it."""
HUNG = 86
"""No progress within the limits of `watchdog.*`. The same command continues from the last checkpoint."""


def of_signal(number: int) -> int:
    """The code that a shell shows for a process that signal `number` ended."""
    return 128 + number
