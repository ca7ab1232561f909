"""Tokenized triplets on disk. Lengths are read for all rows at once, tokens row by row."""

from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_solopo.config import Role
from megatron_solopo.data.batch_plan import IntArray, TripletSizes, triplet_sizes
from megatron_solopo.data.packing import TokenizedTriplet
from megatron_solopo.data.prepared import token_lengths
from megatron_solopo.data.rows import DEPTHS_FIELD
from megatron_solopo.errors import UserError


class TripletDataset:
    """A memory-mapped `datasets.Dataset` of token ids, read as triplets.

    Args:
        table: Columns `id` (string) and, as lists of integers, `chosen`, `rejected` and the prompts.
        prompt_columns: Context (`short`, `long`) -> the column that holds its prompt. Contexts that no role uses may
            be missing.
    """

    def __init__(self, table: datasets.Dataset, prompt_columns: Mapping[str, str]) -> None:
        # Done once, because it copies the whole chunk list of the table.
        self._table = table.with_format("arrow")
        self._prompt_columns = dict(prompt_columns)

    def __len__(self) -> int:
        return len(self._table)

    def head(self, count: int) -> "TripletDataset":
        """The first `count` rows, or all if there are fewer."""
        return TripletDataset(self._table.select(range(min(count, len(self)))), self._prompt_columns)

    def sizes(self, roles: Sequence[Role], sequence_multiple: int) -> TripletSizes:
        """Size of every row. Reads the list offsets, no token.

        Raises UserError if a context has no column, or if a prompt or response is empty.
        """
        prompts, responses = self._columns(roles)
        lengths = self._lengths({*prompts.values(), *responses.values()})
        return triplet_sizes(
            {context: lengths[column] for context, column in prompts.items()},
            {response: lengths[column] for response, column in responses.items()},
            roles,
            sequence_multiple,
        )

    def response_lengths(self, response: str) -> IntArray:
        """Number of tokens in every row's `chosen` or `rejected`, [rows]."""
        return self._lengths({response})[response]

    def ids(self, rows: Sequence[int] | IntArray) -> list[str]:
        """Ids of some rows."""
        return [str(value) for value in self._table[np.asarray(rows).tolist()]["id"].to_pylist()]

    def evidence_depths(self) -> list[list[float]]:
        """Places of the evidence in every row's long context, from 0 to 1; an empty list if they are not known."""
        if DEPTHS_FIELD not in self._table.column_names:
            return [[] for _ in range(len(self))]
        depths: list[list[float]] = self._table[DEPTHS_FIELD].to_pylist()
        return depths

    def rows(self, indices: Sequence[int] | IntArray, roles: Sequence[Role]) -> list[TokenizedTriplet]:
        """The triplets at some row numbers, with the prompts and responses that the roles need."""
        prompts, responses = self._columns(roles)
        numbers = np.asarray(indices).tolist()
        chunk: pa.Table = self._table[numbers]
        return [
            TokenizedTriplet(
                id=str(chunk["id"][place].as_py()),
                index=number,
                prompts={context: _tokens(chunk[column][place]) for context, column in prompts.items()},
                responses={response: _tokens(chunk[column][place]) for response, column in responses.items()},
            )
            for place, number in enumerate(numbers)
        ]

    def _columns(self, roles: Sequence[Role]) -> tuple[dict[str, str], dict[str, str]]:
        """The columns that the roles need: by context, and by response."""
        prompts: dict[str, str] = {}
        responses: dict[str, str] = {}
        for role in roles:
            column = self._prompt_columns.get(role.context)
            if column is None or column not in self._table.column_names:
                known = ", ".join(self._table.column_names)
                raise UserError(
                    f"the prepared data has no {role.context} prompts (columns: {known}); "
                    "prepare rows with prompt_short and prompt_long, or change objective.name"
                )
            prompts[role.context], responses[role.response] = column, role.response
        return prompts, responses

    def _lengths(self, columns: set[str]) -> dict[str, IntArray]:
        lengths = {column: token_lengths(self._table, column) for column in columns}
        for column, length in sorted(lengths.items()):
            empty = np.flatnonzero(length == 0)
            if len(empty):
                raise UserError(
                    f"{len(empty)} triplets have no token in {column}, first {', '.join(self.ids(empty[:5]))}; "
                    f"prepare the data of data.path again without them"
                )
        return lengths


def _tokens(cell: pa.ListScalar) -> NDArray[np.integer]:
    tokens: NDArray[np.integer] = cell.values.to_numpy()
    return tokens
