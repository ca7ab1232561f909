"""A GPTModel that projects the response positions alone to the vocabulary.

The prompt's hidden states never reach the output layer. So memory and time of the head depend on the responses alone,
and 128K tokens of a prompt cost no logits.

Shapes: t positions on this rank, N response rows on this context-parallel rank, H hidden size, V padded vocabulary,
W tensor-parallel size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_solopo.model.divergence import TokenAlignment, exchange_teachers, reverse_kl
from megatron_solopo.model.segments import Segments
from megatron_solopo.parallel.megatron_internals import OutputOverride, add_base_class, run_forward_pre_hooks


@dataclass
class PackedResponses(PackedSeqParams):  # type: ignore[misc]
    """Megatron's packing metadata, and the response positions of this context-parallel rank.

    Where responses share prompts, Megatron sees the whole pack as one sequence. Its own fields then serve the rotary
    embedding alone, and attention reads `segments`.

    It goes with the pack through every pipeline stage. Only the last stage reads the responses. All of it is made when
    the pack is cut, so that the head never waits for a number from the device.
    """

    response_rows: Tensor | None = None
    """int64 [N]: local positions whose hidden state predicts a response token. The end of a shared prompt comes for
    each of its responses."""
    response_labels: Tensor | None = None
    """int64 [N]: the predicted tokens."""
    gathering: "RowGathering | None" = None
    """How sequence-parallel ranks gather those rows; None without tensor parallelism."""
    alignment: TokenAlignment | None = None
    """Which response rows are compared with which, where a divergence is wanted."""
    places: Any = None
    """`routing.TokenPlaces` of this rank's positions, where routers of experts are watched."""
    segments: Segments | None = None
    """What the queries of this rank see; None where attention does not read it."""
    positions: Tensor | None = None
    """int64 [T]: the place in its sequence of each token that this rank holds, where Megatron's rotary embedding looks
    for it. None: the boundaries tell."""
    kernel_packing: PackedSeqParams | None = None
    """The segments as Transformer Engine's kernels take them; None: no prompt is shared, and its own fields tell."""


class ResponseHead(OutputOverride):
    """Makes the last stage of a GPTModel return label log-probabilities, fp32 [N], instead of logits.

    With `with_squares` or `aligns_tokens` it returns more rows of N numbers, as `label_logprobs` says.

    Parameters, checkpoints, tied weights and pipeline stages are GPTModel's own. Call the model as
    `model(tokens, None, None, packed_seq_params=PackedResponses(...))`. With any other packing it returns logits.
    """

    real_vocab_size: int
    """Vocabulary without padding. Padding gets no probability."""
    chunk_tokens: int
    """Response rows projected at a time."""
    with_squares: bool = False
    """Whether to return the log of the sum of squared probabilities, too."""
    aligns_tokens: bool = False
    """Whether packs say which response rows to compare, and their divergences are returned, too."""
    reads_all_segments: bool
    """Whether attention reads the segments of packs without shared prompts, too; see `attach_shared_prompts`."""

    def overrides(self, packed_seq_params: PackedSeqParams | None) -> bool:
        return isinstance(packed_seq_params, PackedResponses)

    def override(self: Any, hidden_states: Tensor, packed_seq_params: PackedResponses) -> Tensor:
        tied = self.share_embeddings_and_output_weights
        run_forward_pre_hooks(self.output_layer)  # it is not called here, but its weight must be complete
        rows, labels = packed_seq_params.response_rows, packed_seq_params.response_labels
        assert rows is not None and labels is not None
        tensor_group = self.pg_collection.tp
        hidden = hidden_states.squeeze(1)  # [t, 1, H] -> [t, H]
        if self.config.sequence_parallel:
            assert packed_seq_params.gathering is not None
            hidden = gather_rows(hidden, packed_seq_params.gathering, tensor_group)
        else:
            hidden = hidden.index_select(0, rows)
        alignment, teachers = packed_seq_params.alignment, None
        if alignment is not None:
            teachers = alignment, exchange_teachers(hidden, alignment, self.pg_collection.cp)
        return label_logprobs(
            hidden,
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels,
            vocab_size=self.real_vocab_size,
            chunk_tokens=self.chunk_tokens,
            with_squares=self.with_squares,
            teachers=teachers,
            tensor_group=tensor_group,
            # Under sequence parallelism the gather's backward sums the gradients already.
            reduce_hidden_gradient=tensor_group.size() > 1 and not self.config.sequence_parallel,
        )


class ResponseModel(ResponseHead, GPTModel):  # type: ignore[misc]
    """Megatron-Core's GPTModel with the response-only head."""

    def __init__(self, *args: Any, real_vocab_size: int, chunk_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.chunk_tokens = chunk_tokens


def attach_response_head(model: GPTModel, *, real_vocab_size: int, chunk_tokens: int) -> None:
    """Give a GPTModel of any subclass, built by other code, the response-only head, in place."""
    if not isinstance(model, ResponseHead):
        add_base_class(model, ResponseHead)
    model.real_vocab_size = real_vocab_size
    model.chunk_tokens = chunk_tokens


@dataclass(frozen=True)
class RowGathering:
    """Which rows of a sequence-parallel tensor each tensor-parallel rank sends, and where they arrive."""

    sent_rows: Tensor
    """int64: local positions of this rank's rows. Every rank sends equally many, as gloo needs it, and at least one. So
    the position 0 fills up the shorter ones."""
    kept_rows: Tensor
    """int64 [N]: places of the wanted rows among those that all ranks send."""


def plan_gathering(rows_N: Tensor, local_positions: int, size: int, rank: int) -> RowGathering:
    """Plan `gather_rows` on the host.

    Args:
        rows_N: positions over all ranks, equal on every rank. A position may come more than once.
        local_positions: positions that each rank holds.
        size: tensor-parallel size.
        rank: tensor-parallel rank.
    """
    owners_N = rows_N // local_positions
    counts = torch.bincount(owners_N, minlength=size)
    sent = max(int(counts.max()), 1)
    own = rows_N[owners_N == rank] - rank * local_positions
    # Rows arrive by owner, and in their order within an owner.
    order = owners_N.argsort(stable=True)
    places = torch.cat([torch.arange(count) + owner * sent for owner, count in enumerate(counts.tolist())])
    return RowGathering(F.pad(own, (0, sent - len(own))), torch.empty_like(order).index_copy(0, order, places))


def gather_rows(hidden_tH: Tensor, gathering: RowGathering, group: torch.distributed.ProcessGroup) -> Tensor:
    """Gather single rows of a sequence-parallel tensor, and no others, to every tensor-parallel rank.

    Args:
        hidden_tH: this rank's contiguous 1/W of all positions.

    Returns:
        [N, H], equal on every rank. Backward reduce-scatters.
    """
    gathered = gather_from_sequence_parallel_region(
        hidden_tH.index_select(0, gathering.sent_rows), tensor_parallel_output_grad=True, group=group
    )
    rows_NH: Tensor = gathered.index_select(0, gathering.kept_rows)
    return rows_NH


def label_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    vocab_size: int,
    chunk_tokens: int,
    tensor_group: torch.distributed.ProcessGroup,
    reduce_hidden_gradient: bool,
    with_squares: bool = False,
    teachers: tuple[TokenAlignment, Tensor] | None = None,
) -> Tensor:
    """Return the log-probability of each row's label under a vocabulary-parallel output layer, fp32 [N].

    Logits exist for at most `chunk_tokens` rows at a time, forward and backward. With more rows than that, each chunk
    is projected again in the backward pass instead of being kept.

    The weight's gradient is summed over the chunks in fp32: in `main_grad`, if Megatron gave the weight one of that
    precision. A sum in bfloat16 would lose more with every chunk.

    Args:
        hidden_NH: the same on every tensor-parallel rank.
        weight_VH: this rank's shard [V / W, H] of the output (or tied embedding) weight.
        vocab_size: the real vocabulary. Rows of the weight beyond it are padding and get no probability.
        reduce_hidden_gradient: sum the gradient of `hidden_NH` over the tensor-parallel ranks here, because no
            gather's backward does.
        with_squares: return another row of N: log(sum over the vocabulary of p**2), without gradient. It takes another
            fp32 copy of a chunk's logits for a moment.
        teachers: which rows are students, and the hidden states of their teachers [M, H]. Return another row of N: the
            divergence of each student from its teacher, see `divergence.reverse_kl`, and 0 for other rows. It takes
            three more fp32 copies of the logits of a chunk's students for a moment.
    """
    first_column = tensor_group.rank() * weight_VH.shape[0]
    num_real = max(0, min(vocab_size - first_column, weight_VH.shape[0]))
    settings = _HeadSettings(
        num_real,
        chunk_tokens,
        tensor_group if reduce_hidden_gradient else None,
        tensor_group,
        with_squares,
        teachers,
    )
    rows = _LabelLogprobs.apply(hidden_NH, weight_VH, labels_N, settings)  # type: ignore[no-untyped-call]
    wanted = [row for row in rows if row is not None]
    return torch.stack(wanted) if len(wanted) > 1 else wanted[0]


@dataclass(frozen=True)
class _HeadSettings:
    num_real: int
    """Columns of this rank that are no padding."""
    chunk_tokens: int
    reduce_group: torch.distributed.ProcessGroup | None
    """Sum the gradient of the hidden states over this group; None: do not."""
    tensor_group: torch.distributed.ProcessGroup
    with_squares: bool
    teachers: tuple[TokenAlignment, Tensor] | None
    """As for `label_logprobs`."""


@dataclass
class _Chunk:
    """Some projected rows."""

    logits_CV: Tensor
    """A leaf, which holds the probabilities instead once the log-probabilities are there."""
    logprobs_C: Tensor
    squares_C: Tensor | None
    students: slice
    """Which students are among the rows."""
    divergence_K: Tensor | None
    divergence_gradient_KV: Tensor | None
    """Of each student's divergence with respect to its logits."""


class _LabelLogprobs(torch.autograd.Function):
    """`label_logprobs` as one node of the graph, so that its backward sees the weight's gradients of all chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, settings: _HeadSettings
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.weight, ctx.settings = weight_VH, settings
        logprobs, squares, divergences = [], [], []
        for rows in _chunks(len(labels_N), settings.chunk_tokens):
            ctx.chunk = None  # frees a chunk before the next one is projected
            ctx.chunk = _project(hidden_NH, weight_VH, labels_N, rows, settings)
            logprobs.append(ctx.chunk.logprobs_C.detach())
            squares.append(ctx.chunk.squares_C)
            divergences.append(ctx.chunk.divergence_K)
        kept_KV = ctx.chunk.divergence_gradient_KV
        if len(logprobs) > 1:
            ctx.chunk = kept_KV = None
        else:
            ctx.chunk.divergence_gradient_KV = None
        ctx.save_for_backward(hidden_NH, labels_N, kept_KV)
        squares_N = divergences_N = None
        if settings.with_squares:
            squares_N = torch.cat(squares)
            ctx.mark_non_differentiable(squares_N)
        if settings.teachers is not None:
            rows_K = settings.teachers[0].student_rows_K
            found_K = torch.cat([each for each in divergences if each is not None] or [logprobs[0].new_zeros(0)])
            divergences_N = found_K.new_zeros(len(labels_N)).index_copy(0, rows_K, found_K)
        return torch.cat(logprobs), squares_N, divergences_N

    @staticmethod
    def backward(
        ctx: Any, gradient_N: Tensor, _: Tensor | None, divergence_gradient_N: Tensor | None
    ) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_NH, labels_N, kept_KV = ctx.saved_tensors
        weight, settings = ctx.weight, ctx.settings
        hidden_gradient_NH = torch.empty_like(hidden_NH)
        weight_gradient = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(labels_N), settings.chunk_tokens):
            chunk = ctx.chunk or _project(hidden_NH, weight, labels_N, rows, settings)
            (logits_gradient_CV,) = torch.autograd.grad(chunk.logprobs_C, chunk.logits_CV, gradient_N[rows])
            change_KV = kept_KV if chunk.divergence_gradient_KV is None else chunk.divergence_gradient_KV
            if change_KV is not None:
                assert settings.teachers is not None and divergence_gradient_N is not None
                rows_K = settings.teachers[0].student_rows_K[chunk.students]
                change_KV.mul_(divergence_gradient_N[rows_K].unsqueeze(1))
                logits_gradient_CV.index_add_(0, rows_K - rows.start, change_KV)
            change_KV = None
            ctx.chunk = chunk = None
            logits_gradient_CV = logits_gradient_CV.to(weight.dtype)
            hidden_gradient_NH[rows] = logits_gradient_CV @ weight
            if weight_gradient is not None:
                weight_gradient.add(logits_gradient_CV.t() @ hidden_NH[rows])
            del logits_gradient_CV  # frees the chunk before the next one is projected
        if settings.reduce_group is not None:
            torch.distributed.all_reduce(hidden_gradient_NH, group=settings.reduce_group)
        return hidden_gradient_NH, None if weight_gradient is None else weight_gradient.result(), None, None


def _chunks(count: int, size: int) -> list[slice]:
    """Slices of at most `size` rows, at least one."""
    return [slice(start, start + size) for start in range(0, max(count, 1), size)]


def _project(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, rows: slice, settings: _HeadSettings) -> _Chunk:
    logits_CV = _logits(hidden_NH[rows], weight_VH, settings.num_real)
    squares_C = _log_sum_of_squares(logits_CV, settings.tensor_group) if settings.with_squares else None
    students, divergence_K, divergence_gradient_KV = slice(0, 0), None, None
    if settings.teachers is not None:
        alignment, teachers_MH = settings.teachers
        students = alignment.within(rows)
        if students.start < students.stop:
            student_KV = logits_CV[alignment.student_rows_K[students] - rows.start]
            teacher_KV = _logits(teachers_MH[alignment.teachers_K[students]], weight_VH, settings.num_real)
            divergence_K, divergence_gradient_KV = reverse_kl(
                student_KV, teacher_KV, settings.num_real, settings.tensor_group
            )
    with torch.enable_grad():
        logits_CV.requires_grad_()
        # Batch axis: the loss is written for [sequence, batch, vocabulary]. It overwrites the logits.
        losses_C1: Tensor = vocab_parallel_cross_entropy(logits_CV.unsqueeze(1), labels_N[rows].unsqueeze(1))
        logprobs_C = -losses_C1.squeeze(1)
    return _Chunk(logits_CV, logprobs_C, squares_C, students, divergence_K, divergence_gradient_KV)


def _logits(hidden_CH: Tensor, weight_VH: Tensor, num_real: int) -> Tensor:
    """This rank's logits, fp32 [C, V / W]. Padding has no probability."""
    logits_CV = (hidden_CH @ weight_VH.t()).float()
    logits_CV[:, num_real:].fill_(-torch.inf)
    return logits_CV


def _log_sum_of_squares(logits_CV: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """log(sum over the whole vocabulary of p**2), fp32 [C]."""
    largest_C = logits_CV.amax(dim=1)
    torch.distributed.all_reduce(largest_C, torch.distributed.ReduceOp.MAX, group=group)
    shifted_CV = logits_CV - largest_C.unsqueeze(1)
    powers_2C = torch.stack([shifted_CV.exp_().sum(dim=1), shifted_CV.square_().sum(dim=1)])
    torch.distributed.all_reduce(powers_2C, group=group)
    sum_C, squares_C = powers_2C.log().unbind()
    return squares_C - 2 * sum_C


class _WeightGradient:
    """The sum of a weight's gradients over chunks, in fp32."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight = weight
        main_grad = getattr(weight, "main_grad", None)
        self.is_in_main_grad = main_grad is not None and main_grad.dtype is torch.float32
        self.total: Tensor | None = main_grad if self.is_in_main_grad else None

    def add(self, product_VH: Tensor) -> None:
        if self.total is None:
            self.total = product_VH.float()
        else:
            self.total.add_(product_VH)

    def result(self) -> Tensor:
        """What autograd gets."""
        assert self.total is not None, "there is at least one chunk"
        if not self.is_in_main_grad:
            return self.total.to(self.weight.dtype)
        # Megatron's hooks wait for a gradient, and add it only where this is false or the weight is also an embedding.
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return self.weight.new_zeros(()).expand_as(self.weight)
