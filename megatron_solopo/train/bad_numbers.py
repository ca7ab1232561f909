"""Steps whose loss or gradient is NaN or infinite: all ranks skip them, and their triplets are named.

A skipped step changes no parameter, no optimizer state and no learning rate, but it consumes its triplets. The run goes
on as if these triplets did not exist. Megatron has no such skip for fp32 and bf16: `optimizer.step` reports `found_inf`
only with a loss scaler, which these precisions do not use, and `check_for_nan_in_grad` of its DDP ends the process.

The cost per step: each rank sums its gradient before it is reduced (one read of the buffers), the gradient's norm is
computed once more than in Megatron, and one flag is all-reduced.
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
from megatron_solopo.errors import is_out_of_space
from megatron_solopo.files import append_synced

SKIPPED_FILE = "skipped_steps.jsonl"


class TripletLosses:
    """The losses of one step on this rank, for each triplet. Only ranks of the last pipeline stage have any."""

    def __init__(self) -> None:
        self._packs: list[tuple[Pack, Tensor]] = []

    def clear(self) -> None:
        """Begin a step."""
        self._packs.clear()

    def observe(self, pack: Pack, loss_T: Tensor) -> None:
        """Keep the losses of a pack on their device, so that nothing waits for it."""
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
    """`loss`, `gradient` (a rank's own, before it was reduced) or `gradient norm` (only the norm of the whole)."""
    triplets: list[str]
    """The triplets whose loss is not finite; for `gradient`, all triplets of the ranks concerned."""
    ranks: list[str]
    """The ranks where it was seen, with their hosts."""

    def __str__(self) -> str:
        where = f" on {', '.join(self.ranks)}" if self.ranks else ""
        of = f" of {', '.join(self.triplets)}" if self.triplets else ""
        return f"step {self.step} skipped: the {self.cause}{of} is not finite{where}"


def describe_skip(step: int, losses: TripletLosses, packs: Iterable[Pack], *, gradient_is_finite: bool) -> SkippedStep:
    """Collect from all ranks why a step was skipped. All ranks call it together.

    Args:
        packs: this rank's packs of the step.
        gradient_is_finite: whether this rank's own gradient was finite, before it was reduced.
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
    """On rank 0: append a skipped step to `skipped_steps.jsonl`, and warn on the console. A full disk is a warning."""
    tqdm.write(f"warning: {skip}")
    path = run_dir / SKIPPED_FILE
    try:
        append_synced(path, json.dumps(asdict(skip)) + "\n")
    except OSError as error:
        if not is_out_of_space(error):
            raise
        tqdm.write(f"warning: {path}: {error.strerror}; step {skip.step} is missing in it")


def _unique(lists: Iterable[Sequence[str]]) -> list[str]:
    """Each triplet once, in order: the ranks of one replica report the same ones."""
    return list(dict.fromkeys(each for one in lists for each in one))
