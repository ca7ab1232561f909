"""What one rank does while a run starts, as `startup_dry_run` counts it."""

from dataclasses import asdict, dataclass
from typing import Any

WORLDS = (8, 64, 1024)
"""Numbers of ranks for which the start is counted."""


@dataclass(frozen=True)
class StartupCounts:
    """What one rank, not rank 0, does in a world of `ranks`."""

    ranks: int
    files_opened: int
    """Opened files of model, data and reference cache; a file that is opened twice counts twice."""
    bytes_read: int
    """From those files, where they are read and not mapped."""
    weight_bytes: int
    """Of mapped weights. 0 if no model was built."""
    exchanges: int
    """Collectives of objects and of a few numbers."""
    exchanged_bytes: int
    """What this rank receives in them."""
    store_keys: int
    """Keys that this rank writes to the store, those of the gloo groups included."""
    gloo_groups: tuple[int, ...]
    """Sizes of this rank's gloo groups beside NCCL. Each rank of a group connects to all others."""

    @property
    def gloo_bytes(self) -> int:
        """What this rank reads from the store to connect its gloo groups: as many addresses as ranks, from each rank.

        Measured with torch 2.13: an entry of a group of n ranks has 154 + 8 n bytes.
        """
        return sum(size * (154 + 8 * size) for size in self.gloo_groups)

    def as_json(self) -> dict[str, Any]:
        """All counts by name."""
        return asdict(self) | {"gloo_bytes": self.gloo_bytes}

    def figures(self) -> dict[str, str]:
        """The counts for a table, by the column's title."""
        return {
            "ranks": f"{self.ranks:,}",
            "files opened": f"{self.files_opened:,}",
            "bytes read": f"{self.bytes_read:,}",
            "exchanges": f"{self.exchanges:,}",
            "bytes exchanged": f"{self.exchanged_bytes:,}",
            "store keys": f"{self.store_keys:,}",
            "gloo connections": f"{sum(size - 1 for size in self.gloo_groups):,}",
            "gloo store bytes": f"{self.gloo_bytes:,}",
        }
