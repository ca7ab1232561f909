"""What every measurement reports: where and when it was made, and tables."""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

GIB = 2**30


def environment(packages: Sequence[str] = ("torch", "megatron-core")) -> dict[str, Any]:
    """Where and when; of the packages, those that are installed."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": f"{os.cpu_count()} x {models[0] if models else platform.machine()}",
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: found for package in packages if (found := _version(package))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---:"] * len(columns), *rows))
