"""What `data build` read, wrote and left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_solopo.data.build_row import Drop, Measured
from megatron_solopo.data.corpus.read import BadRow
from megatron_solopo.data.placement import uniform_distance
from megatron_solopo.data.report import Bars, Chart, Histogram, write_report

_DEPTH_BINS = 10
_SHOWN_DROPS = 3


@dataclass(frozen=True)
class LengthStats:
    """Tokens of prompt and response over the written rows."""

    minimum: int
    mean: float
    median: float
    maximum: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "LengthStats":
        """Summary of at least one length."""
        mean, median = round(float(np.mean(lengths)), 1), float(np.median(lengths))
        return cls(minimum=min(lengths), mean=mean, median=median, maximum=max(lengths))

    def __str__(self) -> str:
        return f"min {self.minimum}, mean {self.mean:.1f}, median {self.median:.1f}, max {self.maximum}"


@dataclass(frozen=True)
class DepthStats:
    """Where the evidence lies in the long contexts, see `data.placement`."""

    tenths: list[int]
    """Pieces of evidence by tenth of the context, from start to end."""
    distance: float
    """Kolmogorov-Smirnov distance to the uniform distribution."""
    critical: float
    """What that distance stays below in 95 of 100 uniform samples."""


@dataclass(frozen=True)
class BuildReport:
    """The numbers of a build; `report.json` holds the same."""

    provenance: dict[str, Any]
    rows_read: int
    """Questions, and rows that are none."""
    rows_written: int
    dropped: dict[str, int]
    """Rows that were not written, by reason."""
    left_out: list[dict[str, Any]]
    """Each of them, with its line in the corpus."""
    pool_documents: int
    """Distinct documents that distractors are drawn from."""
    rows_with_distractors_of_others: int
    """Written rows whose question has too few usable documents of its own for the short context."""
    rows_underfull: int
    """Written rows that are more than 1 % below a length, because the pool does not suffice."""
    rows_without_leak_check: int
    """Written rows whose answer is yes or no."""
    rejected: dict[str, int]
    """Written rows by kind of constructed rejected answer."""
    short_tokens: LengthStats
    long_tokens: LengthStats
    least_fill: float
    """Smallest length of a long context over its target."""
    depth: DepthStats

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"rows: {self.rows_read} questions read, {self.rows_written} rows written"]
        for reason, count in sorted(self.dropped.items()):
            places = [f"{each['id']} (line {each['line']})" for each in self.left_out if each["reason"] == reason]
            more = ", ..." if len(places) > _SHOWN_DROPS else ""
            lines.append(f"  dropped, {reason}: {count}: {', '.join(places[:_SHOWN_DROPS])}{more}")
        lines.append(f"pool: {self.pool_documents} distinct documents")
        counts = {
            "short distractors of other questions": self.rows_with_distractors_of_others,
            "lengths that the pool does not suffice for": self.rows_underfull,
            "yes or no for an answer, not searched for in distractors": self.rows_without_leak_check,
        }
        lines += [f"  rows with {what}: {count}" for what, count in counts.items() if count]
        if self.rejected:
            lines.append(f"rejected answers: {', '.join(f'{count} {kind}' for kind, count in self.rejected.items())}")
        verdict = "uniform" if self.depth.distance < self.depth.critical else "NOT UNIFORM"
        return "\n".join(
            [
                *lines,
                f"short tokens: {self.short_tokens}",
                f"long tokens: {self.long_tokens}, at least {self.least_fill:.2%} of what was asked for",
                f"evidence per tenth of the long context: {' '.join(map(str, self.depth.tenths))}",
                f"  distance to uniform {self.depth.distance:.3f}, {verdict} (5 % of uniform samples reach "
                f"{self.depth.critical:.3f})",
            ]
        )


class Tally:
    """Collects what the report says while rows are written."""

    def __init__(self, provenance: dict[str, Any]) -> None:
        self.bad_rows: list[BadRow] = []
        self.documents = 0
        self.questions = 0
        self._provenance = provenance
        self._measured: list[Measured] = []
        self._drops: list[Drop] = []

    def add(self, result: Measured | Drop) -> None:
        """Take one row's outcome."""
        if isinstance(result, Drop):
            self._drops.append(result)
        else:
            self._measured.append(result)

    def report(self, input: Path) -> BuildReport:
        """All numbers; raises ValueError where no row was built."""
        rows = self._measured
        bad = {(row.path, row.line) for row in self.bad_rows}
        dropped = Counter(drop.reason for drop in self._drops) + Counter({"not of the format": len(bad)})
        if not rows:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
            raise ValueError(f"--input {input}: no question could be built: {reasons}")
        depths = [depth for row in rows for depth in row.depths]
        distance, critical = uniform_distance(depths)
        tenths = np.histogram(depths, bins=_DEPTH_BINS, range=(0, 1))[0].tolist()
        return BuildReport(
            provenance=self._provenance,
            rows_read=self.questions + len(bad),
            rows_written=len(rows),
            dropped=dict(dropped),
            left_out=[asdict(drop) for drop in self._drops]
            + [asdict(Drop(row.line, "", str(row))) for row in self.bad_rows],
            pool_documents=self.documents,
            rows_with_distractors_of_others=sum(row.filled_from_pool for row in rows),
            rows_underfull=sum(row.underfull for row in rows),
            rows_without_leak_check=sum(not row.leak_checked for row in rows),
            rejected=dict(Counter(row.rejected for row in rows if row.rejected)),
            short_tokens=LengthStats.of([row.short_tokens for row in rows]),
            long_tokens=LengthStats.of([row.long_tokens for row in rows]),
            least_fill=round(min(row.long_tokens / row.target_tokens for row in rows), 5),
            depth=DepthStats(tenths, round(distance, 4), round(critical, 4)),
        )

    def write(self, report: BuildReport, output: Path) -> None:
        """Write `report.json` and the page, see `data.report`."""
        rows = self._measured
        charts: list[Chart] = [
            Histogram("Long context with response", "tokens", [row.long_tokens for row in rows]),
            Histogram("Short context with response", "tokens", [row.short_tokens for row in rows]),
            Histogram(
                "Evidence in the long context", "depth, 0 is the start", [d for row in rows for d in row.depths], (0, 1)
            ),
            Histogram(
                "Length over target, long context", "ratio", [row.long_tokens / row.target_tokens for row in rows]
            ),
        ]
        if report.dropped:
            charts.append(Bars("Rows that were dropped", report.dropped))
        values = report.to_json()
        left_out = values.pop("left_out")
        write_report(output, f"Contexts: {output.name}", str(report), values, charts, left_out)
