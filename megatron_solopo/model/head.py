"""A GPTModel that projects response positions alone to the vocabulary.

The prompt's hidden states never reach the output layer, so 128K prompt tokens cost no logits:
memory and time of the head depend on the responses alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_solopo.model.logprob import label_logprobs
from megatron_solopo.parallel.megatron_internals import OutputOverride, add_base_class


@dataclass
class PackedResponses(PackedSeqParams):
    """Megatron's packing metadata plus the response positions of this context-parallel rank.

    It travels with the pack through every pipeline stage; only the last one reads the responses.
    """

    response_rows: Tensor | None = None
    """int64 [N], ascending: local positions whose hidden state predicts a response token."""
    response_labels: Tensor | None = None
    """int64 [N]: the predicted tokens."""


class ResponseHead(OutputOverride):
    """Makes the last stage of a GPTModel return label log-probabilities, fp32 [N], instead of logits.

    Parameters, checkpoints, tied weights and pipeline stages are GPTModel's own. Call the model as
    `model(tokens, None, None, packed_seq_params=PackedResponses(...))`. With any other packing it returns logits.
    """

    real_vocab_size: int
    """Vocabulary without padding. Padding gets no probability."""
    chunk_tokens: int
    """Response rows projected at a time."""

    def overrides(self, packed_seq_params: PackedSeqParams | None) -> bool:
        return isinstance(packed_seq_params, PackedResponses)

    def override(self: Any, hidden_states: Tensor, packed_seq_params: PackedResponses) -> Tensor:
        tied = self.share_embeddings_and_output_weights
        rows, labels = packed_seq_params.response_rows, packed_seq_params.response_labels
        assert rows is not None and labels is not None
        tensor_group = self.pg_collection.tp
        hidden = hidden_states.squeeze(1)  # [t, 1, H] -> [t, H]
        if self.config.sequence_parallel:
            hidden = gather_rows(hidden, rows, tensor_group)
        else:
            hidden = hidden.index_select(0, rows)
        return label_logprobs(
            hidden,
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels,
            vocab_size=self.real_vocab_size,
            chunk_tokens=self.chunk_tokens,
            tensor_group=tensor_group,
            # Under sequence parallelism the gather's backward sums the gradients already.
            reduce_hidden_gradient=tensor_group.size() > 1 and not self.config.sequence_parallel,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
        )


class ResponseModel(ResponseHead, GPTModel):
    """Megatron-Core's GPTModel with the response-only head."""

    def __init__(self, *args: Any, real_vocab_size: int, chunk_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.chunk_tokens = chunk_tokens


def attach_response_head(model: GPTModel, *, real_vocab_size: int, chunk_tokens: int) -> None:
    """Give a GPTModel that someone else has built, of whatever subclass, the response-only head, in place."""
    if not isinstance(model, ResponseHead):
        add_base_class(model, ResponseHead)
    model.real_vocab_size = real_vocab_size
    model.chunk_tokens = chunk_tokens


def gather_rows(hidden_tH: Tensor, rows_N: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Gather single rows of a sequence-parallel tensor, and nothing else, to every tensor-parallel rank.

    Args:
        hidden_tH: this rank's contiguous 1/W of all positions.
        rows_N: ascending positions over all ranks, equal on every rank.

    Returns:
        [N, H], equal on every rank; backward reduce-scatters.
    """
    size, rank, local_positions = group.size(), group.rank(), len(hidden_tH)
    counts = torch.bincount(rows_N // local_positions, minlength=size)
    # Every rank sends equally many rows (gloo needs that), at least one; the surplus is dropped below.
    sent = max(int(counts.max()), 1)
    first = int(counts[:rank].sum())
    own = rows_N[first : first + int(counts[rank])] - rank * local_positions
    padded = F.pad(own, (0, sent - len(own)))
    gathered = gather_from_sequence_parallel_region(
        hidden_tH.index_select(0, padded), tensor_parallel_output_grad=True, group=group
    )
    kept = [torch.arange(int(count), device=rows_N.device) + owner * sent for owner, count in enumerate(counts)]
    return gathered.index_select(0, torch.cat(kept))
