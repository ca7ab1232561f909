"""What Megatron's schedules run for every pack: forward, objective, and the scale of the loss.

The gradient's scale: with `calculate_per_token_loss`, Megatron sums gradients over micro-batches and over data- and
context-parallel ranks. It then divides by the sum, over the same ranks, of the counts that the loss function reports.
We report the pack's triplets on each of its CP ranks, and return CP times the summed loss. So both sums have the factor
CP. However the triplets are packed or distributed, the gradient is exactly that of the mean over the global batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import tee

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from megatron_solopo.config import ObjectiveConfig, Role
from megatron_solopo.data.packing import Pack, PackGroup
from megatron_solopo.model.adapters import dropout_in
from megatron_solopo.model.microbatch import Microbatch, shard_pack
from megatron_solopo.objective import FurtherSum, compute_objective, further_sums, metric_names
from megatron_solopo.parallel.megatron_internals import without_delayed_fp8, without_shape_messages
from megatron_solopo.parallel.topology import Topology

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class ReferenceLogprobs:
    """Summed reference log-probabilities of every sequence of a data set, fp32 [rows, R]."""

    roles: tuple[Role, ...]
    logps: Tensor

    def to(self, device: torch.device) -> "ReferenceLogprobs":
        """The same numbers on another device."""
        return ReferenceLogprobs(self.roles, self.logps.to(device))

    def select(self, roles: Sequence[Role], rows: Tensor) -> dict[Role, Tensor]:
        """By role, fp32 [len(rows)]."""
        return {role: self.logps[rows, self.roles.index(role)] for role in roles}


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    packs: Sequence[Pack],
    loss_function: Callable[[Microbatch], LossFunction],
    topology: Topology,
    *,
    forward_only: bool,
    before_pack: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Run Megatron's schedule (plain, 1F1B or interleaved) over this rank's packs.

    Args:
        before_pack: called before this stage's forward of every pack. Without pipeline stages it may raise, because
            then only gradients have changed.

    Returns the third value of `loss_function(microbatch)(output)` for each pack, in order, on the last pipeline stage,
    and an empty list on the other stages.
    """
    settings = get_model_config(chunks[0])
    has_experts = settings.num_moe_experts is not None
    watches_routers = has_experts and (not forward_only or settings.moe_enable_routing_replay)
    aligns_tokens = get_attr_wrapped_model(chunks[0], "aligns_tokens")
    all_segments = any(get_attr_wrapped_model(chunk, "reads_all_segments") for chunk in chunks)
    microbatches: Iterable[Microbatch] = (
        shard_pack(
            pack,
            topology,
            with_places=watches_routers,
            is_trained=not forward_only,
            aligns_tokens=aligns_tokens,
            all_segments=all_segments,
        )
        for pack in packs
    )
    if not forward_only:  # a pass over a data set has many packs, so each moves to the device when its turn comes
        microbatches = list(microbatches)
    positions = [pack.padded_tokens // topology.context_group.size() for pack in packs]
    return run_microbatches(
        chunks, microbatches, positions, loss_function, forward_only=forward_only, before_each=before_pack
    )


def run_microbatches(
    chunks: Sequence[torch.nn.Module],
    microbatches: Iterable[Microbatch],
    positions: Sequence[int],
    loss_function: Callable[[Microbatch], LossFunction],
    *,
    forward_only: bool,
    before_each: Callable[[], None] | None = None,
) -> list[Tensor]:
    """`run_schedule` for packs that are already cut; `before_each` is its `before_pack`.

    Args:
        microbatches: each is asked for when its turn comes.
        positions: of each micro-batch on a context-parallel rank. So every stage knows the shapes of the hidden states
            that come from other stages.
    """

    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        if before_each is not None:
            before_each()
        return forward_microbatch(model, next(iterator), loss_function)

    # Every virtual stage consumes the same packs again, each through an iterator of its own.
    iterators = tee(microbatches, len(chunks))
    several = len(chunks) > 1
    config = get_model_config(chunks[0])
    sequence_shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
    shapes = [(length // sequence_shards, 1, config.hidden_size) for length in positions]
    precision = without_delayed_fp8(config) if forward_only else nullcontext()
    with precision, dropout_in(chunks, is_training=not forward_only):
        reports: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=list(iterators) if several else iterators[0],
            model=list(chunks) if several else chunks[0],
            num_microbatches=len(positions),
            seq_length=1,  # not read, and neither is the next: packs differ
            micro_batch_size=1,
            forward_only=forward_only,
            **without_shape_messages(config, shapes),
        )
    return reports


def forward_microbatch(
    model: torch.nn.Module, microbatch: Microbatch, loss_function: Callable[[Microbatch], LossFunction]
) -> tuple[Tensor, LossFunction]:
    """The forward step that Megatron's schedules call: this stage's output, and the function that makes it a loss."""
    output = model(microbatch.tokens_1t, None, None, packed_seq_params=microbatch.packing)
    return output, loss_function(microbatch)


@dataclass(frozen=True)
class SourceLoss:
    """How the rows of one source are judged."""

    objective: ObjectiveConfig
    references: ReferenceLogprobs | None
    """Of its rows; None if its objective needs none."""


def objective_loss(
    objective: ObjectiveConfig,
    references: ReferenceLogprobs | None,
    topology: Topology,
    observe: Callable[[Pack, Tensor], None] | None = None,
) -> Callable[[Microbatch], LossFunction]:
    """`mixture_loss` of one source; reports fp32 [M], the sums of `metric_names(objective)`."""
    return mixture_loss([SourceLoss(objective, references)], topology, observe)


def mixture_loss(
    sources: Sequence[SourceLoss],
    topology: Topology,
    observe: Callable[[Pack, Tensor], None] | None = None,
) -> Callable[[Microbatch], LossFunction]:
    """The loss function of training and evaluation.

    The loss of a pack is the sum over its triplets, whatever their sources. So the gradient of a step is that of the
    mean over all triplets of the batch, and a source counts as many triplets as it has there.

    The report is fp32 [M]: for each source in turn, the sums of `metric_names` of its objective. They are 0 for a
    source without a triplet in the pack, so all ranks reduce reports of one length.

    Args:
        sources: by the number that the packs give them. Their objectives differ by name alone.
        observe: called with every pack and its triplets' losses [T].
    """
    # A copy of 4 bytes per sequence. Reading it on the host for every pack would make the host wait for the device.
    references = [None if each.references is None else each.references.to(topology.device) for each in sources]

    def loss(microbatch: Microbatch, head_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pack = microbatch.pack
        counts = [group.num_sequences for group in pack.groups]
        further = further_sums(sources[0].objective)
        sums_by_group = torch.split(_sums(microbatch, head_output, further, topology), counts, dim=1)
        lengths = torch.split(microbatch.counted_lengths_S, counts)
        rows = torch.split(microbatch.triplet_indices, [group.num_triplets for group in pack.groups])
        losses = []
        reports = [torch.zeros(len(metric_names(each.objective)), device=topology.device) for each in sources]
        for group, sums, lengths_S, rows_T in zip(pack.groups, sums_by_group, lengths, rows, strict=True):
            objective, reference, known = sources[group.source].objective, references[group.source], None
            if objective.needs_reference:
                assert reference is not None
                known = reference.select(group.roles, rows_T)
            logps, *others = (_by_role(sums_S, group) for sums_S in sums)
            result = compute_objective(
                objective, logps, _by_role(lengths_S, group), known, dict(zip(further, others, strict=True))
            )
            losses.append(result.loss_T)
            reports[group.source] = torch.stack([each.sum() for each in result.metrics.values()]).float()
        loss_T = torch.cat(losses)
        if observe is not None:
            observe(pack, loss_T)
        return loss_T.sum() * topology.context_group.size(), _count(pack, topology), torch.cat(reports)

    return lambda microbatch: partial(loss, microbatch)


def _sums(microbatch: Microbatch, head_output: Tensor, further: Sequence[FurtherSum], topology: Topology) -> Tensor:
    """Sums over the response tokens of each sequence: of log-probabilities, then of `further`. Returns [1 + ..., S]."""
    token_logprobs_N, *others_N = head_output.unbind() if head_output.dim() > 1 else (head_output,)
    values = [token_logprobs_N]
    if "verbose_logps" in further:
        values.append(token_logprobs_N.where(microbatch.verbose_N, 0))
    return microbatch.sequence_sums(torch.stack([*values, *others_N]), topology.context_group)


def logprob_report(topology: Topology, ld_alpha: float | None = None) -> Callable[[Microbatch], LossFunction]:
    """The loss function of forward-only passes over one source; reports sequence log-probabilities, fp32 [T, R].

    Args:
        ld_alpha: weight of verbose tokens, see `Pack.verbose_N`; None: 1.
    """

    def loss(microbatch: Microbatch, token_logprobs_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if ld_alpha is not None:
            token_logprobs_N = token_logprobs_N.where(~microbatch.verbose_N, ld_alpha * token_logprobs_N)
        logps_S = microbatch.sequence_sums(token_logprobs_N, topology.context_group)
        (group,) = microbatch.pack.groups
        return logps_S.sum(), _count(microbatch.pack, topology), logps_S.view(group.num_triplets, len(group.roles))

    return lambda microbatch: partial(loss, microbatch)


def _by_role(values_S: Tensor, group: PackGroup) -> dict[Role, Tensor]:
    """[S] -> [T] for each role: sequences are ordered by triplet, then by role."""
    values_TR = values_S.view(group.num_triplets, len(group.roles))
    return dict(zip(group.roles, values_TR.unbind(dim=1), strict=True))


def _count(pack: Pack, topology: Topology) -> Tensor:
    return torch.full((), pack.num_triplets, dtype=torch.int, device=topology.device)
