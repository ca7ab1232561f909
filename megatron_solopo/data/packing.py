"""A pack: the sequences of whole triplets in a single row of tokens, with every prompt once.

A sequence is a prompt and one response. A block is a prompt and the responses that share it, one behind the other. A
response sees the prompt and itself, and its positions follow those of the prompt. Without sharing, every sequence is a
block.

A response may hold tokens that nobody trains, such as the results of tools between two turns of the assistant. They
are context: they take positions, and have no label.

A pack may hold rows of several sources, whose rows have other sequences: a triplet three or four, a pair two, an
instruction one. All are called triplets here.

Shapes: T padded positions of the pack, B blocks, B1 = B + 1, S sequences, N response tokens of all sequences that
count, L with those that do not, R roles.
Sequences are ordered by source, then by triplet and then by role. So those of one source, [S_own], reshape to
[its triplets, R].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_solopo.config import Role, prompt_groups
from megatron_solopo.data.blocks import Block, layout_blocks

PAD_TOKEN = 0
"""Id at padded positions. Any legal id would do: padding follows its sequence and has no label."""


@dataclass(frozen=True, eq=False)
class TokenizedTriplet:
    """The token ids of one dataset row, without padding. No prompt or response is empty."""

    id: str
    """Its id in the dataset; in a mixture, behind the source's name and a slash."""
    index: int
    """Number of the row in the dataset."""
    prompts: Mapping[str, NDArray[np.integer]]
    """Context (`short`, `long`) -> ids of its prompt."""
    responses: Mapping[str, NDArray[np.integer]]
    """Response (`chosen`, `rejected`) -> its ids."""
    masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """Response -> whether each of its tokens counts, at least one. All tokens of a response without a mask count."""

    def counted(self, response: str) -> NDArray[np.bool_]:
        """Whether each token of a response counts."""
        return self.masks[response] if response in self.masks else np.ones(len(self.responses[response]), bool)

    @property
    def shorter_response(self) -> int:
        """Tokens that count in the shorter of its responses."""
        return min(int(self.counted(response).sum()) for response in self.responses)


class PackGroup(NamedTuple):
    """The triplets of one source in a pack. They follow each other and have the same sequences."""

    source: int
    """Number of the source in the run."""
    roles: tuple[Role, ...]
    num_triplets: int

    @property
    def num_sequences(self) -> int:
        """Sequences of all its triplets."""
        return len(self.roles) * self.num_triplets


@dataclass(frozen=True, eq=False)
class Pack:
    """One micro-batch on the host, before context parallelism divides it. Tensors are int64 unless noted."""

    blocks: tuple[Block, ...]
    """Where its blocks and their responses lie."""
    tokens_T: Tensor
    """Input ids. `PAD_TOKEN` fills up each block."""
    cu_seqlens_B1: Tensor
    """Boundaries of the padded blocks, int32: block b is at [cu_seqlens[b], cu_seqlens[b + 1])."""
    prompt_lengths_B: Tensor
    """Tokens of the prompt at the start of each block."""
    blocks_S: Tensor
    """Block of each sequence."""
    response_starts_S: Tensor
    """Position in [0, T) of the first token of each response. The first response of a block follows the prompt."""
    response_lengths_S: Tensor
    """Response tokens of each sequence, whether they count or not."""
    counted_lengths_S: Tensor
    """Response tokens of each sequence that count."""
    predictors_L: Tensor
    """Position in [0, T) whose hidden state predicts each response token: the position before the token, or the end of
    the prompt. Labels are shifted here, before context parallelism divides the pack, so no token at an edge is lost."""
    response_rows_N: Tensor
    """The same of the tokens that count."""
    response_labels_N: Tensor
    """The tokens that count."""
    response_sequences_N: Tensor
    """Number in [0, S) of the sequence of each token that counts."""
    verbose_N: Tensor
    """bool: whether the token lies beyond the length of the shorter response that the sequences of its triplet read. If
    they read one response alone, no token does. Tokens that do not count have no part in lengths."""
    groups: tuple[PackGroup, ...]
    """In the order of their sources. A source without a triplet here has none."""
    triplet_indices: Tensor
    """Row of each triplet in the data of its source, [num_triplets]."""
    ids: tuple[str, ...]
    """Id of each triplet."""

    @property
    def num_triplets(self) -> int:
        """Triplets of all sources."""
        return sum(group.num_triplets for group in self.groups)

    @property
    def squares(self) -> int:
        """What `forward_flops` calls so: twice the pairs of a query and a key that it sees, without padding."""
        prompts_S = self.prompt_lengths_B[self.blocks_S]
        own = self.sequence_lengths_S.square().sum() - prompts_S.square().sum()
        return int(own + self.prompt_lengths_B.square().sum())

    @property
    def shares_prompts(self) -> bool:
        """Whether a block has more than one response."""
        return len(self.blocks_S) > len(self.prompt_lengths_B)

    @property
    def sequence_lengths_S(self) -> Tensor:
        """Tokens of prompt and response in each sequence, without padding."""
        return self.prompt_lengths_B[self.blocks_S] + self.response_lengths_S

    @property
    def block_lengths_B(self) -> Tensor:
        """Tokens of each block, without padding."""
        return self.prompt_lengths_B.index_add(0, self.blocks_S, self.response_lengths_S)

    @property
    def max_block_length(self) -> int:
        """Length of the longest block with its padding, which attention kernels ask for beside `cu_seqlens_B1`."""
        return int(self.cu_seqlens_B1.diff().max())

    @property
    def num_tokens(self) -> int:
        """Tokens without padding. A shared prompt counts once."""
        return int(self.prompt_lengths_B.sum() + self.response_lengths_S.sum())

    @property
    def runs_T(self) -> Tensor:
        """The run that each position belongs to: b for the prompt of block b, B + s for the response of sequence s.

        Padding belongs to the last response of its block.
        """
        starts, runs = self._run_starts.sort()
        return runs.repeat_interleave(torch.cat([starts, starts.new_tensor([self.padded_tokens])]).diff())

    @property
    def positions_T(self) -> Tensor:
        """The place of each token in its sequence, from 0."""
        prompts_B = torch.zeros_like(self.prompt_lengths_B)
        first = torch.cat([prompts_B, self.prompt_lengths_B[self.blocks_S]])
        return torch.arange(self.padded_tokens) - (self._run_starts - first)[self.runs_T]

    @property
    def _run_starts(self) -> Tensor:
        """First position of each prompt, then of each response."""
        return torch.cat([self.cu_seqlens_B1[:-1].long(), self.response_starts_S])

    @property
    def padded_tokens(self) -> int:
        """Positions of the pack, T."""
        return len(self.tokens_T)


class SourceRows(NamedTuple):
    """Triplets of one source, which have the same sequences in the same order."""

    source: int
    roles: Sequence[Role]
    rows: Sequence[TokenizedTriplet]


def build_pack(
    rows: Sequence[TokenizedTriplet],
    roles: Sequence[Role],
    sequence_multiple: int,
    pack_multiple: int = 1,
    *,
    share_prompts: bool,
) -> Pack:
    """Make a pack of triplets of one source; see `build_mixed_pack`."""
    return build_mixed_pack([SourceRows(0, roles, rows)], sequence_multiple, pack_multiple, share_prompts=share_prompts)


def build_mixed_pack(
    parts: Sequence[SourceRows], sequence_multiple: int, pack_multiple: int = 1, *, share_prompts: bool
) -> Pack:
    """Make a pack of some triplets.

    Args:
        parts: The triplets of each source, at least one.
        sequence_multiple: Each block is padded at its end to a multiple of this.
        pack_multiple: The pack is padded to a multiple of this, at the end of its last block. It is 1 or a multiple of
            `sequence_multiple`.
        share_prompts: Whether responses behind the same prompt share it.
    """
    prompts: list[NDArray[np.integer]] = []
    responses: list[NDArray[np.integer]] = []
    sequences_B: list[list[int]] = []
    for part in parts:
        for row in part.rows:
            for group in prompt_groups(part.roles, share_prompts):
                prompts.append(row.prompts[part.roles[group[0]].context])
                sequences_B.append([len(responses) + role for role in group])
            responses += [row.responses[role.response] for role in part.roles]
    rows = [row for part in parts for row in part.rows]
    response_lengths_S = np.array([len(response) for response in responses], dtype=np.int64)
    # With an empty prompt, the end of the block before it would predict the first response token.
    assert min(map(len, prompts)) > 0 and response_lengths_S.min() > 0

    responses_B = [response_lengths_S[sequences].tolist() for sequences in sequences_B]
    blocks = layout_blocks(zip(map(len, prompts), responses_B, strict=True), sequence_multiple, pack_multiple)
    boundaries_B1 = [*(block.start for block in blocks), blocks[-1].end]
    blocks_S, prompt_ends_S, response_starts_S = np.empty((3, len(responses)), dtype=np.int64)
    for number, (block, sequences) in enumerate(zip(blocks, sequences_B, strict=True)):
        blocks_S[sequences], prompt_ends_S[sequences] = number, block.ends[0]
        response_starts_S[sequences] = block.response_starts

    tokens_T = np.full(boundaries_B1[-1], PAD_TOKEN, dtype=np.int64)
    for start, tokens in zip((*boundaries_B1[:-1], *response_starts_S), (*prompts, *responses), strict=True):
        tokens_T[start : start + len(tokens)] = tokens
    place_in_response_L = _places(response_lengths_S)
    token_places_L = np.repeat(response_starts_S, response_lengths_S) + place_in_response_L
    predictors_L = np.where(place_in_response_L == 0, np.repeat(prompt_ends_S, response_lengths_S), token_places_L) - 1
    counted_L, counted_lengths_S, verbose_N = _count(parts)
    return Pack(
        blocks=blocks,
        tokens_T=torch.from_numpy(tokens_T),
        cu_seqlens_B1=torch.tensor(boundaries_B1, dtype=torch.int32),
        prompt_lengths_B=torch.tensor([block.prompt for block in blocks]),
        blocks_S=torch.from_numpy(blocks_S),
        response_starts_S=torch.from_numpy(response_starts_S),
        response_lengths_S=torch.from_numpy(response_lengths_S),
        counted_lengths_S=torch.from_numpy(counted_lengths_S),
        predictors_L=torch.from_numpy(predictors_L),
        response_rows_N=torch.from_numpy(predictors_L[counted_L]),
        response_labels_N=torch.from_numpy(tokens_T[token_places_L[counted_L]]),
        response_sequences_N=torch.from_numpy(np.repeat(np.arange(len(responses)), counted_lengths_S)),
        verbose_N=torch.from_numpy(verbose_N),
        groups=tuple(PackGroup(part.source, tuple(part.roles), len(part.rows)) for part in parts),
        triplet_indices=torch.tensor([row.index for row in rows]),
        ids=tuple(row.id for row in rows),
    )


def _count(parts: Sequence[SourceRows]) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.bool_]]:
    """Which response tokens count [L], how many of each sequence [S], and which of these are verbose [N]."""
    sequences = [(row, role.response) for part in parts for row in part.rows for role in part.roles]
    counted_S = [row.counted(response) for row, response in sequences]
    lengths_S = np.array([counted.sum() for counted in counted_S], dtype=np.int64)
    assert lengths_S.min() > 0, "a mean over the tokens of a response needs one"
    shared_lengths_S = np.array([row.shorter_response for row, _ in sequences])
    return np.concatenate(counted_S), lengths_S, _places(lengths_S) >= np.repeat(shared_lengths_S, lengths_S)


def _places(lengths_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each token in its sequence, for tokens of sequences one behind the other."""
    return np.concatenate([np.arange(length) for length in lengths_S])
