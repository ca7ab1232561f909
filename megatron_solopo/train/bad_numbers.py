"""Steps whose loss or gradient is NaN or infinite: skipped by all ranks together, counted and named.

A skipped step changes no parameter, no optimizer state and no learning rate, but its triplets are consumed: the run is
the one that never saw them. Megatron itself has no such skip for fp32 and bf16: `optimizer.step` reports `found_inf`
only with a loss scaler, which these precisions have not, and `check_for_nan_in_grad` of its DDP ends the process.

Cost: the gradient's sum on every rank before it is reduced (one read of the buffers), its norm once more than Megatron
takes it, and one all-reduce of a flag per step.
"""

import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_solopo.data.packing import Pack

SKIPPED_FILE = "skipped_steps.jsonl"


@dataclass(frozen=True)
class SkippedSteps:
    """How many steps a run has skipped; the same on every rank, and kept in checkpoints."""

    total: int = 0
    in_a_row: int = 0
    """Up to and with the last step."""

    def after(self, *, skipped: bool) -> "SkippedSteps":
        """The count behind one more step."""
        return SkippedSteps(self.total + skipped, self.in_a_row + 1 if skipped else 0)


class TripletLosses:
    """The losses of one step on this rank, triplet by triplet; there are none but on the last pipeline stage."""

    def __init__(self) -> None:
        self._packs: list[tuple[Pack, Tensor]] = []

    def clear(self) -> None:
        """Begin a step."""
        self._packs.clear()

    def observe(self, pack: Pack, loss_T: Tensor) -> None:
        """Keep the losses of a pack, where they are: nothing waits for the device."""
        self._packs.append((pack, loss_T.detach()))

    def not_finite(self) -> list[str]:
        """Ids of the triplets whose loss is not finite."""
        return [
            pack.ids[place]
            for pack, loss_T in self._packs
            for place in (~torch.isfinite(loss_T)).nonzero().flatten().tolist()
        ]


@dataclass(frozen=True)
class SkippedStep:
    """Why a step was skipped; the same on every rank."""

    step: int
    cause: str
    """loss, gradient (of a rank, before it was reduced) or gradient norm (of the whole alone)."""
    triplets: list[str]
    """Those whose loss is not finite; else those of the ranks whose gradient was not."""
    ranks: list[str]
    """Where it was seen first: rank and host."""

    def __str__(self) -> str:
        where = f" on {', '.join(self.ranks)}" if self.ranks else ""
        of = f" of {', '.join(self.triplets)}" if self.triplets else ""
        return f"step {self.step} skipped: the {self.cause}{of} is not finite{where}"


def describe(step: int, losses: TripletLosses, packs: Iterable[Pack], *, gradient_is_finite: bool) -> SkippedStep:
    """Bring together what the ranks know of a step that all of them skipped; called by all ranks.

    Args:
        packs: of this rank in this step.
        gradient_is_finite: of this rank alone, before it was reduced.
    """
    mine = {
        "rank": f"rank {dist.get_rank()} ({socket.gethostname()})",
        "loss": losses.not_finite(),
        "gradient": [] if gradient_is_finite else [triplet for pack in packs for triplet in pack.ids],
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for cause in ("loss", "gradient"):
        found = [each for each in everyone if each[cause]]
        if found:
            return SkippedStep(step, cause, _unique(each[cause] for each in found), [each["rank"] for each in found])
    return SkippedStep(step, "gradient norm", [], [])


def record_skip(run_dir: Path, skip: SkippedStep) -> None:
    """Write a skipped step where programs look, and on the console."""
    with (run_dir / SKIPPED_FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(skip)) + "\n")
    tqdm.write(f"warning: {skip}")


def _unique(lists: Iterable[Sequence[str]]) -> list[str]:
    """In order; the ranks of one replica report the same triplets."""
    return list(dict.fromkeys(each for one in lists for each in one))
