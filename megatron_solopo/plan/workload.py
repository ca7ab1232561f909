"""The triplets of a run and how the real packer shares them out under a layout."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_solopo.architecture.layout import pack_multiple, packs_multiple, sequence_multiple
from megatron_solopo.config import Config, Role
from megatron_solopo.data.batch_plan import (
    IntArray,
    RankPacks,
    TripletSizes,
    check_batch_size,
    padded_lengths,
    plan_global_batch,
    triplet_sizes,
)
from megatron_solopo.errors import UserError

_SEED = 0
_TOO_LONG = 2**31
"""Tokens of a sequence: lengths are int32 where attention reads them."""


@dataclass(frozen=True, eq=False)
class Workload:
    """Token counts of a data set's triplets [D]."""

    prompts: Mapping[str, IntArray]
    """By context: `short`, `long`."""
    responses: Mapping[str, IntArray]
    """By answer: `chosen`, `rejected`."""
    num_triplets: int
    """Of the whole data set; the arrays may be a sample of it."""
    source: str
    """Where the lengths come from, for a reader."""

    def longest(self, roles: Sequence[Role]) -> int:
        """Tokens of the longest sequence among these roles."""
        return max(int((self.prompts[role.context] + self.responses[role.response]).max()) for role in roles)


@dataclass(frozen=True, eq=False)
class PackShape:
    """What one pack costs; per context-parallel rank where it says so."""

    padded_tokens: int
    squares: int
    """Sum over its sequences of the padded length squared."""
    tokens: int
    response_rows: int
    """Most response positions on any context-parallel rank: sequences end on the first of them."""
    longest: int
    """Padded length of the longest sequence."""
    triplets: tuple[dict[str, int], ...]
    """Tokens of each triplet's prompts (`short`, `long`) and answers (`chosen`, `rejected`)."""

    @property
    def num_triplets(self) -> int:
        """Whole triplets in the pack."""
        return len(self.triplets)


@dataclass(frozen=True, eq=False)
class BatchShape:
    """One global batch under a layout."""

    heaviest_rank: tuple[PackShape, ...]
    """The packs of the data-parallel rank with most attention work, which the others wait for."""
    num_triplets: int
    num_packs: int
    """Of all data-parallel ranks."""
    pad_waste: float
    """Share of all positions that is padding, in [0, 1)."""
    balance: float
    """Mean attention work of a data-parallel rank over the greatest, in (0, 1]."""


def prepared_workload(path: Path) -> Workload:
    """Lengths of every row of the training split of a prepared data set; raises UserError if it is none."""
    # Slow to import, and needless where lengths are given.
    from megatron_solopo.data.prepared import load_prepared, token_lengths

    data = load_prepared(path)
    contexts = {"short": data.prompt_column("short"), "long": data.prompt_column("long")}
    lengths = {column: token_lengths(data.train, column) for column in (*contexts.values(), "chosen", "rejected")}
    return Workload(
        prompts={context: lengths[column] for context, column in contexts.items()},
        responses={answer: lengths[answer] for answer in ("chosen", "rejected")},
        num_triplets=len(data.train),
        source=f"{path} ({len(data.train):,} triplets)",
    )


def stated_workload(text: str, num_triplets: int, sample: int) -> Workload:
    """Lengths as stated: `short=1024,long=8192:131072,response=512`; LOW:HIGH is spread evenly between the two.

    Args:
        sample: triplets to draw, at most `num_triplets`.

    Raises UserError naming the part that cannot be read. Prompts are counted without the answer.
    """
    ranges = {}
    for part in text.split(","):
        stated = re.fullmatch(r"(short|long|response)=([0-9]+)(?::([0-9]+))?", part)
        if stated is None:
            raise UserError(f"--tokens {part!r}: expected short=N, long=N or response=N; N may be LOW:HIGH")
        name, low, high = stated[1], int(stated[2]), int(stated[3] or stated[2])
        if not 0 < low <= high < _TOO_LONG:
            raise UserError(f"--tokens {part!r}: lengths must be from 1 to {_TOO_LONG - 1:,}, and LOW at most HIGH")
        if name in ranges:
            raise UserError(f"--tokens {text!r}: {name} is stated twice")
        ranges[name] = (low, high)
    if missing := {"short", "long", "response"} - set(ranges):
        raise UserError(f"--tokens {text!r}: {', '.join(sorted(missing))} missing")
    generator = np.random.default_rng(_SEED)
    count = min(sample, num_triplets)
    drawn = {
        name: generator.integers(*ranges[key], size=count, endpoint=True)
        for name, key in (("short", "short"), ("long", "long"), ("chosen", "response"), ("rejected", "response"))
    }
    return Workload(
        {context: drawn[context] for context in ("short", "long")},
        {answer: drawn[answer] for answer in ("chosen", "rejected")},
        num_triplets,
        f"{text} ({num_triplets:,} triplets)",
    )


class Packer:
    """Packs one sample batch of a workload under many layouts; layouts that pack alike share the work."""

    def __init__(self, workload: Workload, config: Config) -> None:
        self.workload, self.config = workload, config
        self.roles = config.objective.roles.all
        size = config.training.global_batch_size
        available = len(workload.responses["chosen"])
        generator = np.random.default_rng(_SEED)
        if available < size:
            raise UserError(
                f"training.global_batch_size={size}: more than the {available} triplets of {workload.source}; lower it"
            )
        self.rows = generator.permutation(available)[:size]
        self._sizes_by_multiple: dict[int, TripletSizes] = {}
        self._plans: dict[tuple[int, ...], RankPacks] = {}
        self._shapes: dict[tuple[tuple[int, ...], int, int], BatchShape] = {}

    def largest(self, multiple: int, whole: int) -> int:
        """Padded tokens of the largest triplet, in a pack of its own."""
        return int(padded_lengths(self._sizes(multiple).padded_tokens.max(), whole))

    def pack(self, config: Config, data_parallel_size: int) -> BatchShape:
        """The batch under a layout.

        Raises UserError where the trainer would: a triplet over the budget, or a batch that does not divide.
        """
        parallel = config.parallel
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        multiple, whole = sequence_multiple(tp, cp), pack_multiple(parallel, config.model)
        packs = packs_multiple(
            parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
        )
        check_batch_size(config.training.global_batch_size, data_parallel_size, packs)
        budget = config.data.max_tokens_per_pack
        if (largest := self.largest(multiple, whole)) > budget:
            raise UserError(
                f"the largest triplet needs {largest:,} padded tokens (multiples of {multiple}), more than "
                f"data.max_tokens_per_pack={budget}; raise it to that"
            )
        key = (multiple, budget // whole * whole, packs, data_parallel_size)
        if (key, whole, cp) not in self._shapes:
            if key not in self._plans:
                self._plans[key] = self._plan(*key)
            self._shapes[key, whole, cp] = self._batch(self._plans[key], multiple, whole, cp)
        return self._shapes[key, whole, cp]

    def _sizes(self, multiple: int) -> TripletSizes:
        if multiple not in self._sizes_by_multiple:
            workload = self.workload
            sizes = triplet_sizes(workload.prompts, workload.responses, self.roles, multiple)
            self._sizes_by_multiple[multiple] = sizes
        return self._sizes_by_multiple[multiple]

    def _plan(self, multiple: int, budget: int, packs: int, ranks: int) -> RankPacks:
        return plan_global_batch(
            self._sizes(multiple).select(self.rows),
            max_tokens=budget,
            max_triplets=self.config.data.max_triplets_per_pack,
            num_ranks=ranks,
            packs_multiple=packs,
        )

    def _batch(self, planned: RankPacks, multiple: int, whole: int, cp: int) -> BatchShape:
        sizes = self._sizes(multiple)
        loads = [sum(int(sizes.cost[self.rows[pack]].sum()) for pack in rank) for rank in planned]
        heaviest = planned[loads.index(max(loads))]
        positions = sum(
            int(padded_lengths(sizes.padded_tokens[self.rows[pack]].sum(), whole)) for rank in planned for pack in rank
        )
        return BatchShape(
            heaviest_rank=tuple(self._shape(self.rows[pack], multiple, whole, cp) for pack in heaviest),
            num_triplets=len(self.rows),
            num_packs=sum(len(rank) for rank in planned),
            pad_waste=1 - int(sizes.tokens[self.rows].sum()) / positions,
            balance=sum(loads) / len(loads) / max(loads),
        )

    def _shape(self, rows: IntArray, multiple: int, whole: int, cp: int) -> PackShape:
        columns = {**self.workload.prompts, **self.workload.responses}
        triplets = [{name: int(column[row]) for name, column in columns.items()} for row in rows]
        return pack_shape(triplets, self.roles, multiple, whole, cp)


def pack_shape(
    triplets: Sequence[Mapping[str, int]], roles: Sequence[Role], multiple: int, whole: int, cp: int
) -> PackShape:
    """Shape of a pack.

    Args:
        triplets: tokens by prompt (`short`, `long`) and answer (`chosen`, `rejected`).
        multiple: each sequence is padded to a multiple of this.
        whole: the pack is padded to a multiple of this.
        cp: context-parallel size.
    """
    prompts_S = np.array([triplet[role.context] for triplet in triplets for role in roles])
    responses_S = np.array([triplet[role.response] for triplet in triplets for role in roles])
    padded_S = padded_lengths(prompts_S + responses_S, multiple)
    padded_S[-1] += int(padded_lengths(padded_S.sum(), whole)) - int(padded_S.sum())
    chunk_S1 = (padded_S // (2 * cp))[:, None]
    start_C = np.arange(2 * cp)[None, :]
    first_S1 = (prompts_S - 1)[:, None]
    low = np.maximum(first_S1, start_C * chunk_S1)
    high = np.minimum(first_S1 + responses_S[:, None], (start_C + 1) * chunk_S1)
    rows_C = np.maximum(high - low, 0).sum(axis=0)
    rows_by_rank = rows_C[:cp] + rows_C[cp:][::-1]  # rank r holds chunks r and 2 x CP - 1 - r
    return PackShape(
        padded_tokens=int(padded_S.sum()),
        squares=int(np.square(padded_S).sum()),
        tokens=int((prompts_S + responses_S).sum()),
        response_rows=int(rows_by_rank.max()),
        longest=int(padded_S.max()),
        triplets=tuple(dict(triplet) for triplet in triplets),
    )
