"""Which settings of the runs differ."""

from collections.abc import Sequence
from typing import Any

from megatron_solopo.report.runs import Run

_ABSENT = object()


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Dotted key and each run's value, for the keys that are not the same in all; `run_dir` always differs."""
    known = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in known for key in run.config)
    differing = [
        key for key in keys if key != "run_dir" and len({repr(run.config.get(key, _ABSENT)) for run in known}) > 1
    ]
    return [(key, [_shown(run, key) for run in runs]) for key in differing]


def _shown(run: Run, key: str) -> str:
    if not run.config:
        return "unknown"
    value: Any = run.config.get(key, _ABSENT)
    if value is _ABSENT:
        return "no such key"  # a run of another version
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
