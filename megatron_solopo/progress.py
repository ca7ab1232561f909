"""Progress bars of long work."""

import sys
from typing import Any

_LOG_SECONDS = 30.0


def bar_style(unit: str) -> dict[str, Any]:
    """Arguments for tqdm. `unit` is the word behind the counts, in the plural.

    A terminal shows a bar, which disappears at the end. A log gets a line every 30 seconds, so short work has none.
    """
    if sys.stderr.isatty():
        return {"leave": False}
    return {
        "mininterval": _LOG_SECONDS,
        "maxinterval": _LOG_SECONDS,
        "delay": _LOG_SECONDS,
        "bar_format": f"{{desc}}: {{n_fmt}}/{{total_fmt}} {unit} in {{elapsed}}, {{remaining}} to go\n",
    }
