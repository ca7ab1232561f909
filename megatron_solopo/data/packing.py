"""One pack: whole triplets laid end to end in a single row of tokens, ready for the model.

Shape legend: T padded positions of the pack, S sequences, S1 = S + 1, N response tokens of all
sequences, R roles. Sequences are ordered triplet by triplet, roles inner, so that a per-sequence
tensor [S] reshapes to [num_triplets, R].
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
"""Id at padded positions. Padding trails each sequence and no label is there, so any legal id would do."""


@dataclass(frozen=True, eq=False)
class TokenizedTriplet:
    """One dataset row: token ids, not padded, none empty."""

    id: str
    index: int
    """Row number in the dataset."""
    prompts: Mapping[str, NDArray[np.integer]]
    """Context (`short`, `long`) -> ids of the prompt over it."""
    responses: Mapping[str, NDArray[np.integer]]
    """Response (`chosen`, `rejected`) -> its ids."""


@dataclass(frozen=True, eq=False)
class Pack:
    """One micro-batch on the host, not yet cut for context parallelism. Tensors are int64 if not said otherwise."""

    tokens_T: Tensor
    """Input ids, `PAD_TOKEN` behind each sequence."""
    cu_seqlens_S1: Tensor
    """Padded sequence boundaries, int32: sequence s lies at [cu_seqlens[s], cu_seqlens[s + 1])."""
    sequence_lengths_S: Tensor
    """Real lengths, prompt and response, without padding."""
    response_lengths_S: Tensor
    """Response tokens of each sequence."""
    response_rows_N: Tensor
    """Position in [0, T) whose hidden state predicts each response token: the one before it. Labels
    are thus shifted here, over the whole pack, and a later cut cannot lose the token at its edge."""
    response_labels_N: Tensor
    """The response tokens themselves."""
    response_sequences_N: Tensor
    """Sequence number in [0, S) that each response token belongs to."""
    num_triplets: int
    roles: tuple[Role, ...]
    triplet_indices: Tensor
    """Dataset row of each triplet [num_triplets]."""
    ids: tuple[str, ...]
    """Id of each triplet."""

    @property
    def max_sequence_length(self) -> int:
        """Longest sequence, padding included (what a kernel given `cu_seqlens_S1` must know)."""
        return int(self.cu_seqlens_S1.diff().max())

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.sequence_lengths_S.sum())

    @property
    def padded_tokens(self) -> int:
        """Positions of the pack, T."""
        return len(self.tokens_T)


def build_pack(
    rows: Sequence[TokenizedTriplet], roles: Sequence[Role], sequence_multiple: int, pack_multiple: int = 1
) -> Pack:
    """Lay out the sequences of some triplets.

    Args:
        rows: the triplets, at least one.
        roles: the sequences that each triplet yields, in their order inside the triplet.
        sequence_multiple: what each sequence is padded at its end to a multiple of.
        pack_multiple: what the whole pack is padded to a multiple of, at the end of its last sequence;
            itself a multiple of `sequence_multiple`, or 1.
    """
    prompts = [row.prompts[role.context] for row in rows for role in roles]
    responses = [row.responses[role.response] for row in rows for role in roles]
    prompt_lengths_S = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    response_lengths_S = np.array([len(response) for response in responses], dtype=np.int64)
    # An empty prompt would make its first response token a prediction of the sequence before it.
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
