"""What every measurement reports: where and when it was made, and tables, also in the documents that show them."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

GIB = 2**30
LEFT, RIGHT = "---|", " ---: |"
"""How Markdown aligns a column."""
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


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


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = RIGHT) -> str:
    """Markdown."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join([head, f"|{align * len(columns)}", *lines])


def fill_tables(document: str, tables: Mapping[str, str]) -> str:
    """The document with these tables in their `<!-- table: NAME -->` blocks.

    Raises ValueError for a table that has no block.
    """
    if missing := tables.keys() - {block[2] for block in _BLOCK.finditer(document)}:
        raise ValueError(f"the document has no block <!-- table: NAME --> for {', '.join(sorted(missing))}")
    return _BLOCK.sub(
        lambda block: f"{block[1]}{tables[block[2]]}\n{block[3]}" if block[2] in tables else block[0], document
    )
