"""A pass over a whole data set, forward only: packs stream through the pipeline, and results come while it runs.

A pass is divided into parts. Between two parts the pipeline runs empty and all ranks can stop together. A part has at
most 24 x PP packs. In a long pass it has nearly that number, and running empty costs about 4 % of the time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from megatron_solopo.config import Config, Role
from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.data.packing import Pack
from megatron_solopo.model.microbatch import Microbatch
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.progress import bar_style
from megatron_solopo.train.run_data import single_pass
from megatron_solopo.train.step import LossFunction, run_schedule


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class PassPoints:
    """What a pass calls on its way. Both may raise to stop the pass; the default does nothing."""

    before_part: Callable[[], None] = _nothing
    """Called by all ranks together."""
    before_pack: Callable[[], None] = _nothing
    """See `run_schedule`."""


def run_single_pass(
    config: Config,
    chunks: Sequence[torch.nn.Module],
    dataset: TripletDataset,
    topology: Topology,
    loss_function: Callable[[Microbatch], LossFunction],
    observe: Callable[[Pack, Tensor], None],
    label: str,
    *,
    roles: Sequence[Role] | None = None,
    done: NDArray[np.bool_] | None = None,
    points: PassPoints | None = None,
    after_part: Callable[[], None] = _nothing,
) -> None:
    """Run every triplet once, with a progress bar named `label` on rank 0. All ranks together.

    Args:
        loss_function: see `run_schedule`.
        observe: called on the last pipeline stage with each pack that counts and its report, as soon as it is queued.
        roles, done: see `run_data.single_pass`.
        after_part: called by all ranks together after every part.
    """
    points = points or PassPoints()
    work = single_pass(config, dataset, topology, roles, done)
    style = bar_style("triplets")
    with tqdm(desc=label, total=work.num_triplets, unit="triplet", disable=dist.get_rank() != 0, **style) as bar:
        for part in work:
            points.before_part()
            begun = _progress(bar, part.triplets_at, len(chunks))
            counted = iter(part.counted)

            def observed(microbatch: Microbatch, counted: Iterator[bool] = counted) -> LossFunction:
                compute = loss_function(microbatch)

                def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                    found = compute(output)
                    if next(counted):
                        observe(microbatch.pack, found[2])
                    return found

                return loss

            def before_pack(begun: Iterator[None] = begun) -> None:
                points.before_pack()
                next(begun)

            with torch.no_grad():
                run_schedule(chunks, part.packs, observed, topology, forward_only=True, before_pack=before_pack)
            next(begun)
            after_part()


def _progress(bar: "tqdm[None]", triplets_at: Sequence[int], num_chunks: int) -> Iterator[None]:
    """Move the bar to the packs that have left this stage. The packs begin `num_chunks` times each, and then they end.

    Args:
        triplets_at: triplets that all ranks count at each place.
    """
    start = bar.n
    for triplets in accumulate(triplets_at, initial=0):
        for _ in range(num_chunks):
            bar.update(start + triplets - bar.n)
            yield
