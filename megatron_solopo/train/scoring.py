"""Log-probabilities of every sequence of a data set: one pass, forward only, under any layout."""

import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_solopo.config import Config, Role
from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.data.packing import Pack
from megatron_solopo.errors import UserError
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.parallel.agreement import on_every_rank
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.reference_journal import ReferenceJournal
from megatron_solopo.train.signals import Stopped
from megatron_solopo.train.single_pass import PassPoints, run_single_pass
from megatron_solopo.train.step import ReferenceLogprobs, logprob_report

_SHOWN = 3
_SECONDS_BETWEEN_READINGS = 10.0
"""Reading results makes the host wait for the device. A process that is killed loses what it has not read."""


def check_finite(logprobs: ReferenceLogprobs, dataset: TripletDataset, model: str, dtype: str) -> None:
    """Raise UserError, on every rank, if a log-probability is NaN or infinite.

    Args:
        model: its kind and its path, for the message.
        dtype: what it was computed in.
    """
    rows, roles = (~logprobs.logps.isfinite()).nonzero(as_tuple=True)
    if not len(rows):
        return
    shown = ", ".join(
        f"{role_name} of {row_id} ({value:g})"
        for role_name, row_id, value in zip(
            (logprobs.roles[role] for role in roles[:_SHOWN].tolist()),
            dataset.named_ids(rows[:_SHOWN].numpy()),
            logprobs.logps[rows, roles][:_SHOWN].tolist(),
            strict=True,
        )
    )
    raise UserError(
        f"{model} gives log-probabilities that are not finite, for {len(rows)} of {logprobs.logps.numel()} sequences: "
        f"{shown}{', ...' if len(rows) > _SHOWN else ''}; the rows are not the cause: the model has diverged, or its "
        f"numbers exceed {dtype} (model.dtype); take another model"
    )


def score_sequences(
    config: Config,
    chunks: list[ResponseModel],
    dataset: TripletDataset,
    topology: Topology,
    label: str,
    *,
    roles: tuple[Role, ...] | None = None,
    separate_roles: bool = False,
    points: PassPoints | None = None,
    journal: ReferenceJournal | None = None,
) -> ReferenceLogprobs:
    """Run sequences of every triplet through the model once; every rank returns all the numbers.

    Verbose tokens have the weight `objective.ld_alpha`.

    Args:
        label: of the progress bar.
        roles: the sequences; None: those that the objective reads.
        separate_roles: one pass for each role, so that a pack must hold the longest sequence and not the largest
            triplet. Then there is no `objective.ld_alpha`: a pass reads one response, and no token is verbose.
        points: see `run_single_pass`.
        journal: keeps the numbers as they come. Triplets that it holds already are not computed again. A pack runs
            whole, so under one layout the numbers are the same bits as those of a pass that never stopped.
    """
    roles = config.objective.roles.all if roles is None else roles
    assert not separate_roles or config.objective.ld_alpha is None, "which tokens are verbose, both responses say"
    passes = {f"{label}, {role}": (role,) for role in roles} if separate_roles else {label: roles}
    logps = [
        _score_pass(config, chunks, dataset, topology, pass_label, pass_roles, points, journal)
        for pass_label, pass_roles in passes.items()
    ]
    return ReferenceLogprobs(roles, torch.cat(logps, dim=1))


def _score_pass(
    config: Config,
    chunks: list[ResponseModel],
    dataset: TripletDataset,
    topology: Topology,
    label: str,
    roles: tuple[Role, ...],
    points: PassPoints | None,
    journal: ReferenceJournal | None,
) -> Tensor:
    """Summed log-probabilities, fp32 [rows, len(roles)]."""
    kept = torch.full((len(dataset), len(roles)), torch.nan) if journal is None else journal.kept(roles)
    done = kept.isfinite().all(dim=1)
    if done.any() and dist.get_rank() == 0:
        tqdm.write(f"{label}: {int(done.sum()):,} of {len(done):,} triplets were there already", file=sys.stderr)
    append = None if journal is None else lambda rows, values: journal.append(roles, rows, values)
    scores = _Scores(len(dataset), len(roles), append)

    def after_part() -> None:
        scores.read()
        if journal is not None:
            on_every_rank(journal.check)

    try:
        run_single_pass(
            config,
            chunks,
            dataset,
            topology,
            logprob_report(topology, config.objective.ld_alpha),
            scores.observe,
            label,
            roles=roles,
            done=done.numpy(),
            points=points,
            after_part=after_part,
        )
    except Stopped:
        scores.read()
        raise
    found = scores.on_all_ranks(topology)
    assert bool((scores.visits[~done] == 1).all()), "every triplet is scored exactly once"
    return torch.where(done[:, None], kept, found)


class _Scores:
    """Collects the results of this rank's packs, which come as tensors on the device.

    Args:
        append: Gets new results whenever they are read: rows, and their log-probabilities.
    """

    def __init__(
        self, num_rows: int, num_roles: int, append: Callable[[list[int], list[list[float]]], None] | None
    ) -> None:
        self.logps, self.visits = torch.zeros(num_rows, num_roles), torch.zeros(num_rows)
        self._append = append
        self._unread: list[tuple[Tensor, Tensor]] = []
        self._read_at = time.monotonic()

    def observe(self, pack: Pack, logps_TR: Tensor) -> None:
        """See `run_single_pass`."""
        self._unread.append((pack.triplet_indices, logps_TR))
        if time.monotonic() - self._read_at >= _SECONDS_BETWEEN_READINGS:
            self.read()

    def read(self) -> None:
        """Copy what has come to the host, and pass it on."""
        self._read_at = time.monotonic()
        if not self._unread:
            return
        rows, logps = (torch.cat(each) for each in zip(*self._unread, strict=True))
        self._unread.clear()
        logps = logps.float().cpu()
        self.logps[rows] = logps
        self.visits[rows] += 1
        if self._append is not None:
            self._append(rows.tolist(), logps.tolist())

    def on_all_ranks(self, topology: Topology) -> Tensor:
        """The log-probabilities of all ranks, fp32 [rows, roles] on the host. All ranks together."""
        shared = []
        for values in (self.logps, self.visits):
            values = values.to(topology.device)
            dist.all_reduce(values, group=topology.data_group)
            dist.broadcast(values, topology.last_stage_rank, group=topology.pipeline_group)
            shared.append(values.cpu())
        found, self.visits = shared
        return found
