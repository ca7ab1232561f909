"""How large the sequences of each triplet are, for a whole dataset at once.

A role names one sequence of a triplet: the context it is read in and the response it ends with,
`short_chosen` for example. Each sequence is padded at its end to a multiple that the parallel
layout needs, so budgets count padded tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.roles import context_and_response

IntArray = NDArray[np.int64]


def padded_lengths(lengths: IntArray, multiple: int) -> IntArray:
    """Each length rounded up to the next multiple."""
    return -(-lengths // multiple) * multiple


class TripletSize(NamedTuple):
    """What one triplet asks of the pack that holds it."""

    padded_tokens: int
    """Positions it takes up: every sequence rounded up to the multiple."""
    tokens: int
    """Prompt and response tokens of all its sequences, without padding."""
    cost: int
    """Attention cost: the sum over its sequences of the padded length squared, which is what
    causal self-attention over a packed batch is proportional to (no sequence sees another)."""


@dataclass(frozen=True, eq=False)
class TripletSizes:
    """The sizes of D triplets as int64 arrays [D]; the fields are those of `TripletSize`."""

    padded_tokens: IntArray
    tokens: IntArray
    cost: IntArray

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: IntArray) -> list[TripletSize]:
        """The sizes of some rows, in their order."""
        columns = (self.padded_tokens[rows], self.tokens[rows], self.cost[rows])
        return [TripletSize(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def triplet_sizes(
    prompt_lengths: Mapping[str, IntArray],
    response_lengths: Mapping[str, IntArray],
    roles: Sequence[str],
    sequence_multiple: int,
) -> TripletSizes:
    """Sizes of all triplets from token counts.

    Args:
        prompt_lengths: context (`short`, `long`) -> tokens of that prompt [D].
        response_lengths: response (`chosen`, `rejected`) -> tokens of that response [D].
        roles: the sequences that each triplet yields.
        sequence_multiple: what each sequence is padded to a multiple of.
    """
    parts = [context_and_response(role) for role in roles]
    lengths_RD = np.stack([prompt_lengths[context] + response_lengths[response] for context, response in parts])
    lengths_RD = lengths_RD.astype(np.int64)
    padded_RD = padded_lengths(lengths_RD, sequence_multiple)
    return TripletSizes(padded_RD.sum(axis=0), lengths_RD.sum(axis=0), np.square(padded_RD).sum(axis=0))
