"""From tokenized triplets on disk to global batches of packs for one data-parallel rank.

Seed and epoch alone decide the order of the triplets of a source. With several sources, `data.mixture` says which one
each place of the stream takes its next triplet from. A global batch is the next `global_batch_size` of the stream. So
batch b holds the same triplets under every parallel layout, and the number of consumed triplets is the loader's whole
state.
All ranks know all lengths. Each rank plans the whole batch and reads the tokens of its own packs only, so the ranks
need no communication.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.config import Role
from megatron_solopo.data.batch_plan import (
    IntArray,
    RankPacks,
    TripletSizes,
    check_batch_size,
    packs_needed,
    padded_lengths,
    plan_global_batch,
    plan_single_pass,
    share_out_pass,
    triplet_sizes,
)
from megatron_solopo.data.mixture import Stream
from megatron_solopo.data.packing import Pack, SourceRows, TokenizedTriplet, build_mixed_pack
from megatron_solopo.data.prepared import counted_tokens, mask_column, token_lengths
from megatron_solopo.data.rows import DEPTHS_FIELD
from megatron_solopo.errors import UserError

_KEY_OF_DATA = "data.path (or data.sources)"
_STATE_KEYS = {"seed": "seed", "dataset_length": _KEY_OF_DATA, "global_batch_size": "training.global_batch_size"}
"""Values that a saved state and a run must share -> the key that sets each."""


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """This rank's packs, and totals over all data-parallel ranks."""

    packs: list[Pack]
    """Every rank has the same number of packs."""
    num_triplets: int
    """Triplets of the global batch."""
    triplets_of: tuple[int, ...]
    """Those of each source."""
    num_tokens: int
    """Tokens of these triplets, without padding. A shared prompt counts once."""
    num_sequence_tokens: int
    """Tokens of all their sequences, as if no prompt was shared."""
    padded_tokens: int
    """Tokens of these triplets, with every block padded to its multiple."""
    num_packs: int
    """Packs of all ranks."""
    pack_fill: float
    """Tokens without padding over the token budget of all packs, in (0, 1]."""


@dataclass(frozen=True)
class Packing:
    """How triplets become packs, and which packs this rank computes."""

    sequence_multiple: int
    """Each block is padded to a multiple of this."""
    share_prompts: bool
    """Whether responses behind the same prompt share it."""
    max_tokens_per_pack: int
    """Padded tokens that one pack may hold."""
    dp_rank: int
    """This rank among the data-parallel ranks."""
    dp_size: int
    max_triplets_per_pack: int | None = None
    """Triplets that one pack may hold. None: any number."""
    pack_multiple: int = 1
    """Each pack is padded to a multiple of this."""
    packs_multiple: int = 1
    """Every rank gets a multiple of this number of packs."""
    wanted_packs: int = 1
    """Every rank gets at least this number of packs if the batch has enough triplets."""

    @property
    def max_sequence_tokens(self) -> int:
        """Most padded tokens of one pack's sequences, so that the padded pack stays within its budget."""
        return self.max_tokens_per_pack // self.pack_multiple * self.pack_multiple


class TripletDataset:
    """A memory-mapped `datasets.Dataset` of token ids, read as triplets.

    Args:
        table: Columns `id` (string) and, as lists of integers, `chosen`, `rejected` and the prompts. The masks of
            responses are lists of booleans, see `data.prepared`.
        prompt_columns: Context (`short`, `long`) -> the column that holds its prompt. Contexts that no role uses may
            be missing.
        architecture: The model that reads the triplets. It decides how much work each one is.
        source: Name of its source in `data.sources`. It tells rows from those of other sources. Empty: there is one.
    """

    def __init__(
        self, table: datasets.Dataset, prompt_columns: Mapping[str, str], architecture: ModelShape, source: str = ""
    ) -> None:
        # Done once, because it copies the whole chunk list of the table.
        self._table = table.with_format("arrow")
        self._prompt_columns = dict(prompt_columns)
        self._architecture = architecture
        self._source = source

    def __len__(self) -> int:
        return len(self._table)

    def head(self, count: int) -> "TripletDataset":
        """The first `count` rows, or all if there are fewer."""
        table = self._table.select(range(min(count, len(self))))
        return TripletDataset(table, self._prompt_columns, self._architecture, self._source)

    def sizes(self, roles: Sequence[Role], sequence_multiple: int, *, share_prompts: bool) -> TripletSizes:
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
            self._architecture,
            share_prompts=share_prompts,
        )

    def counted_lengths(self, response: str) -> IntArray:
        """Number of tokens in every row's `chosen` or `rejected` that count, [rows]."""
        if mask_column(response) in self._table.column_names:
            return counted_tokens(self._table, mask_column(response))
        return self._lengths({response})[response]

    def ids(self, rows: Sequence[int] | IntArray) -> list[str]:
        """Ids of some rows, as the data has them."""
        return [str(value) for value in self._table[np.asarray(rows).tolist()]["id"].to_pylist()]

    def named_ids(self, rows: Sequence[int] | IntArray) -> list[str]:
        """Ids of some rows, behind the source's name and a slash if it has a name."""
        return [self._named(row_id) for row_id in self.ids(rows)]

    def _named(self, row_id: str) -> str:
        return f"{self._source}/{row_id}" if self._source else row_id

    def evidence_depths(self) -> list[list[float]]:
        """Places of the evidence in every row's long context, from 0 to 1; an empty list if they are not known."""
        if DEPTHS_FIELD not in self._table.column_names:
            return [[] for _ in range(len(self))]
        depths: list[list[float]] = self._table[DEPTHS_FIELD].to_pylist()
        return depths

    def rows(self, indices: Sequence[int] | IntArray, roles: Sequence[Role]) -> list[TokenizedTriplet]:
        """The triplets at some row numbers, with the prompts and responses that the roles need.

        Their ids are those of `named_ids`.
        """
        prompts, responses = self._columns(roles)
        masks = {response: mask_column(response) for response in responses}
        masks = {response: column for response, column in masks.items() if column in self._table.column_names}
        numbers = np.asarray(indices).tolist()
        chunk: pa.Table = self._table[numbers]
        return [
            TokenizedTriplet(
                id=self._named(str(chunk["id"][place].as_py())),
                index=number,
                prompts={context: _values(chunk[column][place]) for context, column in prompts.items()},
                responses={response: _values(chunk[column][place]) for response, column in responses.items()},
                masks={response: _values(chunk[column][place]) for response, column in masks.items()},
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
                    f"{len(empty)} triplets have no token in {column}, first {', '.join(self.named_ids(empty[:5]))}; "
                    f"prepare the data of {_KEY_OF_DATA} again without them"
                )
        return lengths


def _values(cell: pa.ListScalar) -> NDArray[Any]:
    # Arrow keeps booleans as bits, which numpy cannot share.
    values: NDArray[Any] = cell.values.to_numpy(zero_copy_only=False)
    return values


@dataclass(frozen=True, eq=False)
class LoaderSource:
    """One set of triplets that have the same sequences."""

    dataset: TripletDataset
    roles: Sequence[Role]
    """The sequences of each triplet."""
    weight: float = 1.0
    """Its share of the stream is this, divided by the sum over all sources."""


class GlobalBatchLoader:
    """An endless sequence of shuffled global batches.

    Each pass over a source is one permutation of it. No triplet is dropped at the end of a pass: a global batch may
    take the last triplets of one pass and the first of the next.

    Args:
        global_batch_size: Triplets per batch, over all ranks.
        seed: Seed of the permutations.

    Raises UserError if the sources together are smaller than a batch, or if the batch size does not divide over the
    ranks. Also raises it if a triplet exceeds the budget, or if a prompt or response is missing or empty.
    """

    def __init__(
        self,
        sources: Sequence[LoaderSource],
        packing: Packing,
        *,
        global_batch_size: int,
        seed: int,
    ) -> None:
        lengths = [len(source.dataset) for source in sources]
        if sum(lengths) < global_batch_size:
            raise UserError(
                f"{_KEY_OF_DATA} holds {sum(lengths)} triplets, fewer than one global batch of {global_batch_size}; "
                f"lower training.global_batch_size or prepare more data"
            )
        check_batch_size(global_batch_size, packing.dp_size, packing.packs_multiple)
        self._packer = _Packer(sources, packing)
        self.stream = Stream(lengths, [source.weight for source in sources], seed)
        self._identity = {"seed": seed, "dataset_length": sum(lengths), "global_batch_size": global_batch_size}
        self.consumed_triplets = 0

    def next_batch(self) -> GlobalBatch:
        """Return the next global batch and count its triplets as consumed."""
        size = self._identity["global_batch_size"]
        rows = self.stream.rows(self.consumed_triplets, self.consumed_triplets + size)
        batch = self._packer.training_batch(rows)
        self.consumed_triplets += size
        return batch

    def packs_needed(self, num_batches: int) -> Iterator[tuple[int, int]]:
        """For each of the next batches, its start in the stream of triplets and its packs per rank.

        The number of packs is the least that the budget allows. The batch has at least this number, see `Packing`.
        Reads lengths, no tokens.
        """
        size = self._identity["global_batch_size"]
        for number in range(num_batches):
            start = self.consumed_triplets + number * size
            yield start, self._packer.packs_needed(self.stream.rows(start, start + size))

    def next_packs(self) -> int:
        """Packs per rank of the next batch. Reads lengths, no tokens."""
        size = self._identity["global_batch_size"]
        return len(self._packer.plan(self.stream.rows(self.consumed_triplets, self.consumed_triplets + size))[0])

    def largest_pack(self, num_batches: int) -> Pack:
        """The largest pack of the next batches on all ranks, or the largest triplet alone if that is larger."""
        size = self._identity["global_batch_size"]
        packs = [np.array([self._packer.sizes.padded_tokens.argmax()])]
        for number in range(num_batches):
            start = self.consumed_triplets + number * size
            rows = self.stream.rows(start, start + size)
            packs += [rows[positions] for rank in self._packer.plan(rows) for positions in rank]
        return self._packer.pack(max(packs, key=lambda rows: int(self._packer.sizes.padded_tokens[rows].sum())))

    def state_dict(self) -> dict[str, int]:
        """The position in the stream of triplets. It is the same on every rank."""
        return {**self._identity, "consumed_triplets": self.consumed_triplets}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a saved position, with any number of data-parallel ranks.

        Raises UserError if the state has another seed, dataset length or batch size.
        """
        for name, key in _STATE_KEYS.items():
            if state[name] != self._identity[name]:
                raise UserError(
                    f"the checkpoint's data loader has {name} {state[name]}, this run {self._identity[name]}: it would "
                    f"not continue on the same triplets; restore {key}, or set run_dir to another directory"
                )
        self.consumed_triplets = state["consumed_triplets"]


@dataclass(frozen=True, eq=False)
class PassBatch:
    """This rank's packs of one part of a single pass, and what all data-parallel ranks count in it."""

    packs: list[Pack]
    """Every rank has the same number of packs."""
    counted: list[bool]
    """Whether each pack counts. Run a pack that does not, but leave its results out."""
    triplets_at: list[int]
    """Triplets that all ranks count at each place of `packs`."""


class SinglePass:
    """Every triplet of a source once, for evaluation and reference passes.

    All ranks must run the same number of packs, so a rank with too few packs repeats one that does not count.

    Args:
        packs_per_part: packs that each rank runs in one go, see `architecture.layout.packs_per_part`.
        done: [D], the triplets that need not run. A pack runs if one of its triplets must. None: all must.

    Raises UserError as `GlobalBatchLoader` does.
    """

    def __init__(
        self,
        dataset: TripletDataset,
        roles: Sequence[Role],
        packing: Packing,
        *,
        packs_per_part: int,
        done: NDArray[np.bool_] | None = None,
    ) -> None:
        self._packer = _Packer([LoaderSource(dataset, roles)], packing)
        self._done = np.zeros(len(dataset), dtype=bool) if done is None else done
        packs = self._packer.single_pass()
        self._packs = [rows for rows in packs if not self._done[rows].all()]
        self._parts = share_out_pass(
            [int(self._packer.sizes.cost[rows].sum()) for rows in self._packs],
            num_ranks=packing.dp_size,
            packs_multiple=packing.packs_multiple,
            packs_per_part=packs_per_part,
        )

    @property
    def num_triplets(self) -> int:
        """Triplets that are not done."""
        return int((~self._done).sum())

    def __iter__(self) -> Iterator[PassBatch]:
        """The parts, one after the other. Reads the tokens of this rank's packs."""
        rank = self._packer.packing.dp_rank
        left = np.array([(~self._done[rows]).sum() for rows in self._packs])
        for part in self._parts:
            yield PassBatch(
                packs=[self._packer.pack(self._packs[number]) for number in part.packs[rank]],
                counted=part.counted[rank].tolist(),
                triplets_at=(left[part.packs] * part.counted).sum(axis=0).tolist(),
            )


@dataclass(frozen=True, eq=False)
class _Packer:
    """Turns rows into this rank's share of a batch. Rows of all sources are numbered through, in their order."""

    sources: Sequence[LoaderSource]
    packing: Packing
    sizes: TripletSizes = field(init=False)

    def __post_init__(self) -> None:
        packing = self.packing
        sizes = [
            source.dataset.sizes(source.roles, packing.sequence_multiple, share_prompts=packing.share_prompts)
            for source in self.sources
        ]
        object.__setattr__(self, "sizes", TripletSizes.join(sizes))
        over = np.flatnonzero(self.sizes.padded_tokens > packing.max_sequence_tokens)
        if len(over):
            largest = padded_lengths(self.sizes.padded_tokens.max(), packing.pack_multiple)
            raise UserError(
                f"{len(over)} of {len(self.sizes)} triplets are larger than data.max_tokens_per_pack="
                f"{packing.max_tokens_per_pack}, first {', '.join(self._ids(over[:5]))}; the largest needs "
                f"{largest} (sequences padded to multiples of {packing.sequence_multiple}, packs to multiples of "
                f"{packing.pack_multiple}): raise the key to that, or prepare the data with a lower length limit"
            )

    def _by_source(self, rows: IntArray) -> list[tuple[int, IntArray]]:
        """The rows of each source that has some, by the source's number and their own numbers in it."""
        found, start = [], 0
        for number, source in enumerate(self.sources):
            end = start + len(source.dataset)
            found.append((number, rows[(rows >= start) & (rows < end)] - start))
            start = end
        return [(number, own) for number, own in found if len(own)]

    def _ids(self, rows: IntArray) -> list[str]:
        return [each for number, own in self._by_source(rows) for each in self.sources[number].dataset.named_ids(own)]

    def _count(self, rows: IntArray) -> tuple[int, ...]:
        counts = {number: len(own) for number, own in self._by_source(rows)}
        return tuple(counts.get(number, 0) for number in range(len(self.sources)))

    def training_batch(self, rows: IntArray) -> GlobalBatch:
        packing, plan = self.packing, self.plan(rows)
        num_tokens = int(self.sizes.tokens[rows].sum())
        num_packs = sum(len(packs) for packs in plan)
        return GlobalBatch(
            packs=[self.pack(rows[positions]) for positions in plan[packing.dp_rank]],
            num_triplets=len(rows),
            triplets_of=self._count(rows),
            num_tokens=num_tokens,
            num_sequence_tokens=int(self.sizes.sequence_tokens[rows].sum()),
            padded_tokens=int(self.sizes.padded_tokens[rows].sum()),
            num_packs=num_packs,
            pack_fill=num_tokens / (num_packs * packing.max_tokens_per_pack),
        )

    def plan(self, rows: IntArray) -> RankPacks:
        return plan_global_batch(self.sizes.select(rows), **self._limits())

    def pack(self, rows: IntArray) -> Pack:
        multiples = self.packing.sequence_multiple, self.packing.pack_multiple
        parts = [
            SourceRows(number, source.roles, source.dataset.rows(own, source.roles))
            for number, own in self._by_source(rows)
            for source in [self.sources[number]]
        ]
        return build_mixed_pack(parts, *multiples, share_prompts=self.packing.share_prompts)

    def packs_needed(self, rows: IntArray) -> int:
        packing = self.packing
        return packs_needed(
            self.sizes.select(rows),
            max_tokens=packing.max_sequence_tokens,
            max_triplets=packing.max_triplets_per_pack,
            num_ranks=packing.dp_size,
        )

    def single_pass(self) -> list[IntArray]:
        return plan_single_pass(self.sizes, **self._limits())

    def _limits(self) -> dict[str, Any]:
        return {
            "max_tokens": self.packing.max_sequence_tokens,
            "max_triplets": self.packing.max_triplets_per_pack,
            "num_ranks": self.packing.dp_size,
            "packs_multiple": self.packing.packs_multiple,
            "wanted_packs": self.packing.wanted_packs,
        }
