"""Chat templates that write today's date: what the clock says is fixed for the whole run, and its use is noticed.

transformers gives templates a function `strftime_now`. A prompt that depends on it differs from day to day, in the
prepared data and on a server. The name of a template argument that replaces the clock is found by trial: under another
clock, the prompt must be the same again.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from threading import Lock
from typing import Any

FUNCTION = "strftime_now"
OTHER_DAY = datetime(2001, 2, 3, 4, 5, 6)
"""Differs from today in every part of a date."""
_lock = Lock()
_started = datetime.now()


class Clock:
    """Stands in for the class `datetime` while transformers renders a template."""

    def __init__(self, time: datetime | None = None) -> None:
        self._time = time or _started
        self.told: list[str] = []
        """What the template read, in order."""

    def now(self) -> "Clock":
        """The fixed time."""
        return self

    def strftime(self, format: str) -> str:
        """The time as the template wants it."""
        self.told.append(self._time.strftime(format))
        return self.told[-1]


@contextmanager
def templates_see(clock: Clock) -> Iterator[None]:
    """Every template that transformers renders meanwhile reads this clock. Other threads wait."""
    from transformers.utils import chat_template_utils

    # transformers has no other way to set the time.
    module: Any = chat_template_utils
    with _lock:
        real = module.datetime
        module.datetime = clock
        try:
            yield
        finally:
            module.datetime = real


def names_in(template: str) -> list[str]:
    """Every name in a template, those of dates first."""
    found = dict.fromkeys(re.findall(r"[A-Za-z_]\w*", template))
    return sorted(found, key=lambda name: ("date" not in name.lower(), "time" not in name.lower()))
