"""Where a run stands between two steps."""

from dataclasses import dataclass

Metrics = dict[str, float | int | None]
"""One step's metrics by name, `step` among them; None stands for a number that is not finite or not known."""


@dataclass(frozen=True)
class SkippedSteps:
    """How many steps a run has skipped because a number was not finite."""

    total: int = 0
    in_a_row: int = 0
    """Counted back from the last step."""

    def after(self, *, skipped: bool) -> "SkippedSteps":
        """The counts after one more step."""
        return SkippedSteps(self.total + skipped, self.in_a_row + 1 if skipped else 0)


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint keeps of a run besides model and optimizer; the same on every rank."""

    step: int
    """Steps done, the skipped ones included."""
    loader: dict[str, int]
    """The position in the data, from `GlobalBatchLoader.state_dict`."""
    skipped: SkippedSteps
    unrecorded: Metrics | None = None
    """The last step's metrics, while its evaluation is missing or they are not written: a run continues with these."""
    metrics: Metrics | None = None
    """The last step's metrics, its evaluation included, once they are written."""

    @property
    def first_unrecorded_step(self) -> int:
        """The first step whose metrics this run still has to write."""
        return self.step + (0 if self.unrecorded is not None else 1)
