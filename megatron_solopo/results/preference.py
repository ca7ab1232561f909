"""The JSON file of `evaluate preference`.

Metrics have the names of `metrics.jsonl` with their context: `rewards/accuracies_long` is the share of triplets whose
chosen answer has the higher reward on the long context. Beside the JSON lie, with the same stem, a line for each
triplet (`.jsonl`) and a picture (`.png`).
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_solopo.results.results_file import MeanWithInterval, Results, ResultsPart, read_results


class TripletGroup(ResultsPart):
    """Some triplets."""

    n: int = Field(ge=1)
    ties_short: int | None
    """Triplets with equal rewards, which count as wrong. A policy that is its own reference has only these."""
    ties_long: int | None
    """Null for plain pairs: their only context is called short."""
    metrics: dict[str, MeanWithInterval]


class LengthGroup(TripletGroup):
    """Triplets whose long context and chosen answer have (`above`, `up_to`] tokens; bounds are powers of two."""

    above: int
    up_to: int


class DepthGroup(TripletGroup):
    """Triplets with a piece of evidence in this part of the long context; one with several pieces may be in several."""

    start: float | None
    """Depth, from 0 (start of the context) to 1; both null: the data do not say."""
    end: float | None


class LengthAndDepthGroup(LengthGroup, DepthGroup):
    """Triplets of a length and a depth."""


class PreferenceResults(Results):
    """The file that `evaluate preference` writes."""

    kind: Literal["preference"] = "preference"
    data: str
    data_fingerprint: str
    split: Literal["train", "eval"]
    loss_type: str
    """With `beta`, what a reward is."""
    beta: float
    precision: str
    reference: str | None
    """The model that rewards are measured against; null where the loss type needs none."""
    overall: TripletGroup
    by_length: list[LengthGroup]
    by_depth: list[DepthGroup]
    by_length_and_depth: list[LengthAndDepthGroup]

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
