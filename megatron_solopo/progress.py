"""How long work tells its progress."""

import sys
from typing import Any

_LOG_SECONDS = 30.0


def bar_style(unit: str) -> dict[str, Any]:
    """Arguments for tqdm: a bar that vanishes when done on a terminal; in a log, a line every half minute, and none
    for short work. `unit` is the word behind the counts, in the plural."""
    if sys.stderr.isatty():
        return {"leave": False}
    return {
        "mininterval": _LOG_SECONDS,
        "maxinterval": _LOG_SECONDS,
        "delay": _LOG_SECONDS,
        "bar_format": f"{{desc}}: {{n_fmt}}/{{total_fmt}} {unit} in {{elapsed}}, {{remaining}} to go\n",
    }
