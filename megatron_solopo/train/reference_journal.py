"""What an unfinished reference pass has computed: kept on disk as it comes, and read when the pass is continued.

    <cache>/unfinished/<split>-<start>-<data-parallel rank>.jsonl   a header; a line for each triplet

Each start of a pass writes files of its own, so it never writes behind a line that was cut, and two starts at a time do
not disturb each other. The last pipeline stage of every replica writes what arrives there. A reader takes the complete
lines of all files, under any layout. A finished cache replaces the folder.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from megatron_solopo.config import Role
from megatron_solopo.files import counted
from megatron_solopo.journal import append_lines, complete_lines, header_line, parse_header
from megatron_solopo.parallel.topology import Topology

UNFINISHED = "unfinished"
"""Folder of the journals, inside the cache."""
_ROW = "row"


@dataclass
class ReferenceJournal:
    """The journal of one split, as one rank sees it."""

    path: Path | None
    """The file that this rank appends to; None: another rank writes the same numbers."""
    header: Mapping[str, Any]
    known: Mapping[Role, NDArray[np.float32]]
    """What earlier starts have kept, by role: [D] for D triplets, NaN where there is nothing."""
    num_rows: int
    _failure: OSError | None = field(default=None, init=False)

    def kept(self, roles: Sequence[Role]) -> Tensor:
        """Log-probabilities of earlier starts, fp32 [D, len(roles)]. NaN: not there."""
        nothing = np.full(self.num_rows, np.nan, dtype=np.float32)
        return torch.from_numpy(np.stack([self.known.get(role, nothing) for role in roles], axis=1))

    def append(self, roles: Sequence[Role], rows: Sequence[int], logps: Sequence[Sequence[float]]) -> None:
        """Keep log-probabilities [len(rows), len(roles)]. Those that are not finite are left out.

        It does not raise, because the other pipeline ranks are at work: `check` does.
        """
        lines = [
            json.dumps({_ROW: row} | dict(zip(roles, values, strict=True)))
            for row, values in zip(rows, logps, strict=True)
            if all(map(math.isfinite, values))
        ]
        if self.path is None or self._failure is not None or not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened each time: a network file system cannot remove the folder of an open file.
            with self.path.open("ab") as stream:
                append_lines(stream, lines if stream.tell() else [header_line(dict(self.header)), *lines])
        except OSError as error:
            self._failure = error

    def check(self) -> None:
        """Raise the OSError of an `append` that failed."""
        if self._failure is not None:
            raise self._failure


def journal_name(split: str) -> str:
    """The beginning of the file names of one start, without the rank."""
    return f"{split}-{uuid4().hex[:8]}"


def own_path(folder: Path, name: str, topology: Topology) -> Path | None:
    """The file that this rank writes; None if it writes none."""
    is_first = topology.tensor_group.rank() == topology.context_group.rank() == 0
    return folder / f"{name}-{topology.data_group.rank():04d}.jsonl" if is_first and topology.is_last_stage else None


def read_headers(folder: Path) -> list[dict[str, Any]]:
    """The different headers of all journals in a folder."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl")):
        header = parse_header(next((line for _, line in complete_lines(path)), b"{}"))
        if header is not None and header not in found:
            found.append(header)
    return found


def read_journals(folder: Path, split: str, num_rows: int) -> dict[Role, NDArray[np.float32]]:
    """What the journals of a split hold, as in `ReferenceJournal.known`.

    Damaged lines, and all lines behind a damaged header, are counted and left out.
    """
    found: dict[Role, NDArray[np.float32]] = {}
    damaged = 0
    for path in sorted(folder.glob(f"{split}-*.jsonl")):
        lines = [line for _, line in complete_lines(path)]
        if lines and parse_header(lines[0]) is None:
            # Nothing says of which weights and data these numbers are.
            damaged += len(lines)
            continue
        for line in lines[1:]:
            record = _parse(line, num_rows)
            damaged += record is None
            row, logps = record or (0, {})
            for role, value in logps.items():
                column = found.setdefault(role, np.full(num_rows, np.nan, dtype=np.float32))
                column[row] = value
    if damaged:
        note = f"note: {folder}: {counted(damaged, 'damaged line')} of {split}; their triplets are computed again"
        tqdm.write(note, file=sys.stderr)
    return found


def _parse(line: bytes, num_rows: int) -> tuple[int, dict[Role, float]] | None:
    try:
        record = json.loads(line)
        row = record.pop(_ROW)
        logps = {Role(role): float(value) for role, value in record.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    fits = type(row) is int and 0 <= row < num_rows and all(map(math.isfinite, logps.values()))
    return (row, logps) if fits else None
