"""Exit codes of a run, in addition to 0 (success) and 1 (a bug, with traceback)."""

MISTAKE = 2
"""The user can mend it, and one line says how. Click's own code for wrong usage, too."""
STOPPED = 85
"""A signal asked the run to stop, and everything is saved. The same command continues it."""
HUNG = 86
"""No progress within the limits of `watchdog.*`. The same command continues from the last checkpoint."""


def of_signal(number: int) -> int:
    """The code that a shell shows for a process that signal `number` ended."""
    return 128 + number
