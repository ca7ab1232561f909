"""The section `checkpoint` of the configuration."""

from datetime import datetime
from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, field_validator, model_validator

from megatron_solopo.config_section import Section


class CheckpointConfig(Section):
    """Megatron distributed checkpoints under `<run_dir>/checkpoints`."""

    save_steps: PositiveInt | None = None
    """Save every this many steps, and at the end; null: only at the end."""
    every_minutes: PositiveFloat | None = None
    """Save where this much time has passed since the last save, too."""
    must_save_by: str | None = None
    """Save in time before this moment, too, and go on: an ISO time (2030-01-31T18:00, local unless it says otherwise),
    or `slurm` for the end of the job's time limit. The slowest step and save so far, twice, are left for it; five
    minutes until both were seen."""
    async_save: bool = False
    """Train on while threads write a copy of the state: host memory for this rank's share. `latest` follows when all
    ranks have written; a failure ends the run at the next step."""
    keep_last: PositiveInt | None = None
    """Checkpoints that stay, the newest ones; null: all. A new one is complete before an old one goes."""
    keep_every: PositiveInt | None = None
    """Those of steps that are multiples of this stay besides."""
    best_metric: str | None = None
    """A metric of `metrics.jsonl`, such as eval_loss: of the saved steps that have it, `checkpoints/best` names the one
    with the lowest, and that checkpoint stays besides."""
    greater_is_better: bool = False
    """`checkpoints/best` names the one with the greatest `best_metric` instead."""
    resume: bool = True
    """Continue from the newest whole checkpoint in `<run_dir>/checkpoints`, where there is one; false: refuse a
    directory that holds a run."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """What a checkpoint is held against before it is loaded. checksums: the ranks read every file, each its share, at
    what the disk gives; sizes: finds missing and cut files alone, in a moment."""

    @field_validator("must_save_by")
    @classmethod
    def _is_a_moment(cls, value: str | None) -> str | None:
        try:
            if value not in (None, "slurm"):
                datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is neither an ISO time, as 2030-01-31T18:00, nor slurm") from None
        return value

    @model_validator(mode="after")
    def _what_is_kept_besides_needs_a_limit(self) -> Self:
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError(f"keep_every={self.keep_every} has no part without keep_last: all checkpoints stay")
        if self.greater_is_better and self.best_metric is None:
            raise ValueError("greater_is_better=true has no part without best_metric")
        return self
