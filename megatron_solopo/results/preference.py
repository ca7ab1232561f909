"""What `evaluate preference` found, as its JSON file holds it: `<run_dir>/evaluation/preference-<checkpoint>.json`.

Metrics bear the names of `metrics.jsonl` with their context: `rewards/accuracies_long` is the share of triplets whose
chosen answer has the higher reward on the long context. Beside the JSON lie, with the same stem, a line for each
triplet (`.jsonl`) and a picture (`.png`).
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_solopo.results.long_context import Results, ResultsPart, read_results


class MeanWithInterval(ResultsPart):
    """A mean over triplets and its 95 % confidence interval."""

    mean: float
    low: float | None
    """Null, as `high`, where a single triplet says nothing of the spread."""
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.4f} [one triplet]"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


class Group(ResultsPart):
    """Some triplets."""

    n: int = Field(ge=1)
    ties_short: int | None
    """Triplets whose two rewards are equal, which is not accurate: all, where the policy is its own reference."""
    ties_long: int | None
    """Null for plain pairs, whose only context is called short."""
    metrics: dict[str, MeanWithInterval]


class LengthGroup(Group):
    """Triplets whose long context and chosen answer have (`above`, `up_to`] tokens; bounds are powers of two."""

    above: int
    up_to: int


class DepthGroup(Group):
    """Triplets with a piece of evidence in this part of the long context; one with several pieces may be in several."""

    start: float | None
    """Depth, from 0 (start of the context) to 1; both null: the data do not say."""
    end: float | None


class CellGroup(LengthGroup, DepthGroup):
    """Triplets of a length and a depth."""


class PreferenceResults(Results):
    """The file that `evaluate preference` writes."""

    kind: Literal["preference"] = "preference"
    schema_version: Literal[1] = 1
    name: str
    model: str
    """The directory that was evaluated."""
    run_dir: str | None
    """Of the training run that the checkpoint belongs to; null where it belongs to none."""
    step: int | None
    """Optimizer step of the checkpoint; null where it is of no run."""
    data: str
    data_fingerprint: str
    split: Literal["train", "eval"]
    loss_type: str
    """With `beta`, what a reward is."""
    beta: float
    precision: str
    reference: str | None
    """The model that rewards are measured against; null where the loss type needs none."""
    layout: dict[str, int]
    """Parallel sizes by Megatron-Core's names, and `data_parallel_size`."""
    created: str
    version: str
    command: str
    overall: Group
    by_length: list[LengthGroup]
    by_depth: list[DepthGroup]
    by_length_and_depth: list[CellGroup]

    def __str__(self) -> str:
        """A small table for a reader."""
        rows = {
            "reward accuracy": "rewards/accuracies",
            "reward margin": "rewards/margins",
            "reward of chosen": "rewards/chosen",
            "reward of rejected": "rewards/rejected",
            "likelier answer right": "logps/accuracies",
        }
        contexts = ("short", "long") if self.overall.ties_long is not None else ("short",)
        lines = [
            f"{self.model}: {self.overall.n} triplets of {self.data} ({self.split})",
            f"means and 95 % intervals; rewards of {self.loss_type}",
            f"{'':<22}" + "".join(f"{context + ' context':<30}" for context in contexts),
        ]
        lines += [
            f"{title:<22}" + "".join(f"{self.overall.metrics[f'{name}_{context}']!s:<30}" for context in contexts)
            for title, name in rows.items()
        ]
        lines += [
            f"{title:<22}{self.overall.metrics[name]}"
            for title, name in (("SoLo gap, signed", "solo_ra/gap_signed"), ("SoLo gap, absolute", "solo_ra/gap_abs"))
            if name in self.overall.metrics
        ]
        if ties := (self.overall.ties_short or 0) + (self.overall.ties_long or 0):
            lines.append(
                f"{ties} pairs of equal rewards count as wrong; a policy that is its own reference has only these"
            )
        return "\n".join(line.rstrip() for line in lines)


def read_preference(path: Path) -> PreferenceResults:
    """Read the file, see `read_results`."""
    return read_results(path, PreferenceResults, "evaluate preference")
