"""Divergence of the model behind the long context from itself behind the short one, at each token of a chosen answer.

The head projects a chunk of response rows. For the rows of chosen answers behind the long context (the students), it
also projects the hidden states that predict the same tokens behind the short context (their teachers), without
gradient. Under context parallelism, student and teacher of a token lie on different ranks. So the ranks exchange the
teachers' hidden states, which are few: one row of H numbers for each token of a chosen answer.

Shapes: N response rows on this rank, K of them students, M teachers over all ranks with fillers, H hidden size, V
padded vocabulary, W tensor-parallel size.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_solopo.config import Role
from megatron_solopo.data.packing import Pack


@dataclass(frozen=True)
class TokenAlignment:
    """Which response rows of a rank are students, and where their teachers are. Made when a pack is cut."""

    sent_rows: Tensor
    """int64: this rank's response rows that are teachers. Every context-parallel rank sends equally many; row 0 fills
    up."""
    student_rows_K: Tensor
    """int64, ascending: this rank's response rows that are students."""
    teachers_K: Tensor
    """int64: place of each student's teacher among the rows that all ranks send."""
    host_rows: tuple[int, ...]
    """`student_rows_K` on the host, so that the head never waits for the device."""

    def to(self, device: torch.device) -> "TokenAlignment":
        """The same rows on another device."""
        sent_rows, student_rows_K, teachers_K = (
            each.to(device) for each in (self.sent_rows, self.student_rows_K, self.teachers_K)
        )
        return TokenAlignment(sent_rows, student_rows_K, teachers_K, self.host_rows)

    def within(self, rows: slice) -> slice:
        """The students among a chunk of response rows."""
        return slice(bisect_left(self.host_rows, rows.start), bisect_left(self.host_rows, rows.stop))


def plan_token_alignment(
    pack: Pack, owners_N: Tensor, size: int, rank: int, moved: Callable[[Tensor], Tensor]
) -> TokenAlignment:
    """Pair the tokens of the chosen answers of a pack.

    Args:
        owners_N: context-parallel rank that holds each response row of the pack.
        size, rank: of context parallelism.
        moved: brings a tensor to the device.
    """
    (group,) = pack.groups  # the configuration refuses several sources
    roles_N = pack.response_sequences_N % len(group.roles)
    # Rows come by triplet, then role, then token. So both lists name the same tokens in the same order.
    short_M, long_M = (
        (roles_N == group.roles.index(role)).nonzero().squeeze(1) for role in (Role.SHORT_CHOSEN, Role.LONG_CHOSEN)
    )
    assert len(short_M) == len(long_M), "a chosen answer has the same tokens behind both contexts"
    local_N = torch.empty_like(owners_N)
    for each in range(size):
        own = owners_N == each
        local_N[own] = torch.arange(int(own.sum()), device="cpu")
    counts = torch.bincount(owners_N[short_M], minlength=size)
    sent = max(int(counts.max()), 1)
    places_M = torch.empty_like(short_M)
    for each in range(size):
        own = owners_N[short_M] == each
        places_M[own] = each * sent + torch.arange(int(own.sum()), device="cpu")
    mine = local_N[short_M[owners_N[short_M] == rank]]
    students = owners_N[long_M] == rank
    rows_K = local_N[long_M[students]]
    return TokenAlignment(
        sent_rows=moved(torch.nn.functional.pad(mine, (0, sent - len(mine)))),
        student_rows_K=moved(rows_K),
        teachers_K=moved(places_M[students]),
        host_rows=tuple(rows_K.tolist()),
    )


def exchange_teachers(hidden_NH: Tensor, alignment: TokenAlignment, group: dist.ProcessGroup) -> Tensor:
    """The teachers' hidden states of all context-parallel ranks [M, H], without gradient. All these ranks together."""
    hidden_NH = hidden_NH.detach()
    sent = len(alignment.sent_rows)
    own = hidden_NH[alignment.sent_rows] if len(hidden_NH) else hidden_NH.new_zeros(sent, hidden_NH.shape[1])
    teachers_MH: Tensor = gather_from_sequence_parallel_region(own, group=group)
    return teachers_MH


def reverse_kl(
    student_KV: Tensor, teacher_KV: Tensor, num_real: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """sum_v p(v) * (log p(v) - log q(v)) over the whole vocabulary, with p the student's and q the teacher's.

    Args:
        student_KV, teacher_KV: this rank's logits, fp32 [K, V / W]; both are overwritten.
        num_real: columns of this rank that are no padding.

    Returns:
        The divergence, fp32 [K], and its gradient with respect to the student's logits, fp32 [K, V / W]:
        p * (log p - log q - divergence).
    """
    for logits_KV in (student_KV, teacher_KV):
        logits_KV.sub_(_log_sum_exp(logits_KV, group).unsqueeze(1))
    log_ratio_KV = torch.sub(student_KV, teacher_KV, out=teacher_KV)
    log_ratio_KV[:, num_real:] = 0.0  # padding has no probability, on either side
    probability_KV = student_KV.exp_()
    divergence_K = (probability_KV * log_ratio_KV).sum(dim=1)
    dist.all_reduce(divergence_K, group=group)
    return divergence_K, probability_KV.mul_(log_ratio_KV.sub_(divergence_K.unsqueeze(1)))


def _log_sum_exp(logits_KV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log(sum over the whole vocabulary of exp(logits)), fp32 [K]."""
    largest_K = logits_KV.amax(dim=1)
    dist.all_reduce(largest_K, dist.ReduceOp.MAX, group=group)
    sum_K = (logits_KV - largest_K.unsqueeze(1)).exp_().sum(dim=1)
    dist.all_reduce(sum_K, group=group)
    return largest_K + sum_K.log()
