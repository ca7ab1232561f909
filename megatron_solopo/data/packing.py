"""A pack: the sequences of whole triplets, one behind the other in a single row of tokens.

Shapes: T padded positions of the pack, S sequences, S1 = S + 1, N response tokens of all sequences, R roles.
Sequences are ordered by triplet and then by role, so a tensor [S] reshapes to [num_triplets, R].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_solopo.config import Role
from megatron_solopo.data.batch_plan import padded_lengths

PAD_TOKEN = 0
"""Id at padded positions. Any legal id would do: padding follows its sequence and has no label."""


@dataclass(frozen=True, eq=False)
class TokenizedTriplet:
    """The token ids of one dataset row, without padding. No prompt or response is empty."""

    id: str
    index: int
    """Number of the row in the dataset."""
    prompts: Mapping[str, NDArray[np.integer]]
    """Context (`short`, `long`) -> ids of its prompt."""
    responses: Mapping[str, NDArray[np.integer]]
    """Response (`chosen`, `rejected`) -> its ids."""


@dataclass(frozen=True, eq=False)
class Pack:
    """One micro-batch on the host, before context parallelism divides it. Tensors are int64 unless noted."""

    tokens_T: Tensor
    """Input ids. `PAD_TOKEN` fills up each sequence."""
    cu_seqlens_S1: Tensor
    """Boundaries of the padded sequences, int32: sequence s is at [cu_seqlens[s], cu_seqlens[s + 1])."""
    sequence_lengths_S: Tensor
    """Tokens of prompt and response in each sequence, without padding."""
    response_lengths_S: Tensor
    """Response tokens of each sequence."""
    response_rows_N: Tensor
    """Position in [0, T) whose hidden state predicts each response token: the position before the token. Labels are
    shifted here, before context parallelism divides the pack, so no token at an edge is lost."""
    response_labels_N: Tensor
    """The response tokens themselves."""
    response_sequences_N: Tensor
    """Number in [0, S) of the sequence of each response token."""
    num_triplets: int
    roles: tuple[Role, ...]
    triplet_indices: Tensor
    """Dataset row of each triplet, [num_triplets]."""
    ids: tuple[str, ...]
    """Id of each triplet."""

    @property
    def max_sequence_length(self) -> int:
        """Length of the longest sequence with its padding, which attention kernels ask for beside `cu_seqlens_S1`."""
        return int(self.cu_seqlens_S1.diff().max())

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.sequence_lengths_S.sum())

    @property
    def padded_tokens(self) -> int:
        """Positions of the pack, T."""
        return len(self.tokens_T)


def build_pack(
    rows: Sequence[TokenizedTriplet], roles: Sequence[Role], sequence_multiple: int, pack_multiple: int = 1
) -> Pack:
    """Make a pack of some triplets.

    Args:
        rows: The triplets, at least one.
        roles: The sequences of each triplet, in their order.
        sequence_multiple: Each sequence is padded at its end to a multiple of this.
        pack_multiple: The pack is padded to a multiple of this, at the end of its last sequence. It is 1 or a multiple
            of `sequence_multiple`.
    """
    prompts = [row.prompts[role.context] for row in rows for role in roles]
    responses = [row.responses[role.response] for row in rows for role in roles]
    prompt_lengths_S = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    response_lengths_S = np.array([len(response) for response in responses], dtype=np.int64)
    # With an empty prompt, the end of the sequence before it would predict the first response token.
    assert prompt_lengths_S.min() > 0 and response_lengths_S.min() > 0

    lengths_S = prompt_lengths_S + response_lengths_S
    cu_seqlens_S1 = np.concatenate([[0], np.cumsum(padded_lengths(lengths_S, sequence_multiple))])
    cu_seqlens_S1[-1] = padded_lengths(cu_seqlens_S1[-1], pack_multiple)
    tokens_T = np.full(cu_seqlens_S1[-1], PAD_TOKEN, dtype=np.int64)
    for start, length, prompt, response in zip(cu_seqlens_S1[:-1], lengths_S, prompts, responses, strict=True):
        tokens_T[start : start + length] = np.concatenate([prompt, response])

    num_sequences = len(lengths_S)
    first_rows_S = cu_seqlens_S1[:-1] + prompt_lengths_S - 1
    place_in_response_N = np.concatenate([np.arange(length) for length in response_lengths_S])
    response_rows_N = np.repeat(first_rows_S, response_lengths_S) + place_in_response_N
    return Pack(
        tokens_T=torch.from_numpy(tokens_T),
        cu_seqlens_S1=torch.from_numpy(cu_seqlens_S1.astype(np.int32)),
        sequence_lengths_S=torch.from_numpy(lengths_S),
        response_lengths_S=torch.from_numpy(response_lengths_S),
        response_rows_N=torch.from_numpy(response_rows_N),
        response_labels_N=torch.from_numpy(tokens_T[response_rows_N + 1]),
        response_sequences_N=torch.from_numpy(np.repeat(np.arange(num_sequences), response_lengths_S)),
        num_triplets=len(rows),
        roles=tuple(roles),
        triplet_indices=torch.tensor([row.index for row in rows]),
        ids=tuple(row.id for row in rows),
    )
