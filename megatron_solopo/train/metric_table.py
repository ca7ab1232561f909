"""The metrics of a step from what its packs report: of all rows, and of each source.

A metric of a source is the mean over the source's rows. A metric without a source is the mean over all rows whose
objective has it: `loss` over all, `rewards/accuracies` over those with two responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_solopo.objective import metric_names
from megatron_solopo.train.run_data import RunSource
from megatron_solopo.train.state import Metrics


@dataclass(frozen=True)
class MetricTable:
    """Which metric each number of a report is, see `step.mixture_loss`."""

    sources: Sequence[tuple[str, tuple[str, ...]]]
    """By number of the source: its name, "" for the only one, and the metrics of its objective."""

    @classmethod
    def of(cls, sources: Sequence[RunSource]) -> "MetricTable":
        """The table of a run's sources."""
        return cls([(source.name, metric_names(source.config.objective)) for source in sources])

    @property
    def size(self) -> int:
        """Numbers of a report, M."""
        return sum(len(names) for _, names in self.sources)

    @property
    def names(self) -> tuple[str, ...]:
        """All that `means` returns."""
        return tuple(self.means([0.0] * self.size, [1] * len(self.sources)))

    def means(self, sums: Sequence[float], counts: Sequence[int]) -> Metrics:
        """Metrics by name; None for the mean over no row.

        Args:
            sums: over all rows of the batch [M].
            counts: rows of each source in the batch.
        """
        totals: dict[str, float] = {}
        rows: dict[str, int] = {}
        of_sources: Metrics = {}
        left = iter(sums)
        for (source, names), count in zip(self.sources, counts, strict=True):
            for name in names:
                total = next(left)
                totals[name], rows[name] = totals.get(name, 0.0) + total, rows.get(name, 0) + count
                if source:
                    of_sources[f"source/{source}/{name}"] = _mean(total, count)
        return {name: _mean(total, rows[name]) for name, total in totals.items()} | of_sources


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None
