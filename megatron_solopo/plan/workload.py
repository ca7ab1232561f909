"""The lengths of a run's triplets, and how the packer of training shares them out under a layout."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_solopo.architecture import layout
from megatron_solopo.architecture.flops import attended_squares
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.config import Config, Role, Source, prompt_groups
from megatron_solopo.data.batch_plan import (
    IntArray,
    RankPacks,
    TripletSizes,
    check_batch_size,
    padded_lengths,
    plan_global_batch,
    plan_single_pass,
    triplet_sizes,
)
from megatron_solopo.data.blocks import attended_runs, layout_blocks
from megatron_solopo.data.mixture import Stream
from megatron_solopo.errors import UserError

_SEED = 0
_SAMPLE = 1024
"""Most triplets that a pass over the data set is planned with."""
_TOO_LONG = 2**31
"""Tokens of a sequence. Attention reads lengths as int32."""


@dataclass(frozen=True, eq=False)
class Workload:
    """Token counts of a run's triplets [D]. What the rows of a source do not have counts 0."""

    prompts: Mapping[str, IntArray]
    """Tokens of the prompts by context: `short`, `long`."""
    responses: Mapping[str, IntArray]
    """Tokens of the responses by answer: `chosen`, `rejected`."""
    num_triplets: int
    """Size of the whole data set. The arrays may be a sample of it."""
    source: str
    """Where the lengths come from, in words."""
    largest_token_id: int | None = None
    """Of prepared data; None if it is not known."""
    rows_of_sources: tuple[int, ...] = ()
    """Rows of each source, which follow each other. Empty: there is one."""

    def rows(self, source: int) -> IntArray:
        """Numbers of the rows of a source."""
        counts = self.rows_of_sources or (len(self.responses["chosen"]),)
        start = sum(counts[:source])
        return np.arange(start, start + counts[source])

    def size(self, source: int) -> int:
        """Rows of the whole source."""
        return self.rows_of_sources[source] if self.rows_of_sources else self.num_triplets

    def longest(self, roles: Sequence[Sequence[Role]]) -> int:
        """Tokens of the longest sequence that has one of these roles, which are given for each source."""
        return max(
            int((self.prompts[role.context] + self.responses[role.response])[self.rows(source)].max())
            for source, own in enumerate(roles)
            for role in own
        )


@dataclass(frozen=True, eq=False)
class PackShape:
    """The figures of one pack that decide its cost."""

    padded_tokens: int
    squares: int
    """Sum over its sequences of the padded length squared. What sequences share counts once, see `attended_squares`."""
    tokens: int
    response_rows: int
    """Most response positions on any one context-parallel rank."""
    longest: int
    """Padded length of the longest sequence."""
    shares_prompts: bool
    """Whether responses share a prompt."""
    attended_keys: int
    """Keys that the queries of a context-parallel rank see, on the rank with most of them. A key counts once for each
    segment that sees it, see `activations.gathered_keys`."""
    triplets: tuple[dict[str, int], ...]
    """Tokens of each triplet's prompts (`short`, `long`) and answers (`chosen`, `rejected`)."""

    roles: tuple[tuple[Role, ...], ...]
    """The sequences of each triplet."""

    @property
    def num_triplets(self) -> int:
        """Whole triplets in the pack."""
        return len(self.triplets)


@dataclass(frozen=True, eq=False)
class BatchShape:
    """One global batch under a layout."""

    heaviest_rank: tuple[PackShape, ...]
    """The packs of the data-parallel rank with most attention work. The other ranks wait for it."""
    num_triplets: int
    num_packs: int
    """Packs of all data-parallel ranks."""
    pad_waste: float
    """Share of padding in all positions, in [0, 1)."""
    balance: float
    """Mean attention work of the data-parallel ranks divided by the greatest, in (0, 1]."""


@dataclass(frozen=True, eq=False)
class PassShape:
    """A pass over the whole data set under a layout."""

    packs: tuple[PackShape, ...]
    """Those of a sample of the triplets."""
    num_packs: int
    """Packs of all triplets and all data-parallel ranks."""


def read_workload(config: Config, tokens: str | None, num_triplets: int) -> Workload:
    """Lengths as stated in `tokens`, or those of the run's prepared data if `tokens` is None.

    Raises UserError for data that cannot be opened, and for rows that training would refuse under their objective.
    """
    if tokens is None:
        return mixed_workload(config) if config.data.sources is not None else prepared_workload(config.sources[0])
    if config.data.sources is not None:
        raise UserError("--tokens: states one set of triplets, and data.sources names several; leave --tokens out")
    return stated_workload(tokens, num_triplets, sample=4 * config.training.global_batch_size)


def prepared_workload(source: Source) -> Workload:
    """Lengths of every row in the training split of a source; raises UserError as `read_workload` does."""
    # These imports are slow, and a plan of stated lengths does not need them.
    from megatron_solopo.data.objective_fit import check_kind
    from megatron_solopo.data.prepared import load_prepared, token_lengths

    path = source.config.data.directory
    try:
        data = load_prepared(path)
    except UserError as error:
        if source.name:  # The lengths of several sources cannot be stated.
            raise
        raise UserError(f"{error}; or state the lengths with --tokens") from None
    check_kind(source.config, data.manifest, source.name)
    contexts = {"short": data.prompt_column("short"), "long": data.prompt_column("long")}
    lengths = {column: token_lengths(data.train, column) for column in data.manifest.columns}
    nothing = np.zeros(len(data.train), dtype=np.int64)
    return Workload(
        prompts={context: lengths[column] for context, column in contexts.items()},
        responses={answer: lengths.get(answer, nothing) for answer in ("chosen", "rejected")},
        num_triplets=len(data.train),
        source=f"{path} ({len(data.train):,} triplets)",
        largest_token_id=data.manifest.largest_token_id,
    )


def mixed_workload(config: Config) -> Workload:
    """Lengths of all rows of `data.sources`; raises UserError as `read_workload` does."""
    parts = [prepared_workload(source) for source in config.sources]
    weights = [source.weight for source in config.sources]
    known = [part.largest_token_id for part in parts if part.largest_token_id is not None]
    return Workload(
        prompts={name: np.concatenate([part.prompts[name] for part in parts]) for name in parts[0].prompts},
        responses={name: np.concatenate([part.responses[name] for part in parts]) for name in parts[0].responses},
        num_triplets=sum(part.num_triplets for part in parts),
        source=", ".join(
            f"{weight / sum(weights):.1%} of {part.source}" for part, weight in zip(parts, weights, strict=True)
        ),
        largest_token_id=max(known) if len(known) == len(parts) else None,
        rows_of_sources=tuple(part.num_triplets for part in parts),
    )


def stated_workload(text: str, num_triplets: int, sample: int) -> Workload:
    """Lengths as stated, such as `short=1024,long=8192:131072,response=512`. Prompts are counted without the answer.

    LOW:HIGH draws lengths evenly from LOW to HIGH.

    Args:
        sample: triplets to draw, at most `num_triplets`.

    Raises UserError that names the part that cannot be read.
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


@dataclass(frozen=True)
class _PackingRules:
    """How a layout packs; see `data.loader.Packing`."""

    cp: int
    sequence_multiple: int
    pack_multiple: int
    packs_multiple: int
    share_prompts: bool
    max_tokens: int
    """Of a pack's sequences, so that the padded pack stays within its budget."""

    @classmethod
    def of(cls, config: Config) -> "_PackingRules":
        parallel = config.parallel
        cp = parallel.context_parallel_size
        pack_multiple = layout.pack_multiple(parallel.tensor_model_parallel_size, cp, config.model)
        return cls(
            cp,
            layout.sequence_multiple(cp),
            pack_multiple,
            layout.packs_multiple(
                parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
            ),
            config.data.share_prompts,
            config.data.max_tokens_per_pack // pack_multiple * pack_multiple,
        )


class Packer:
    """Packs one sample batch of a workload under many layouts. Layouts that pack alike share the work.

    Args:
        roles: the sequences of a triplet, for each source; None: those that its objective reads.
    """

    def __init__(
        self,
        workload: Workload,
        config: Config,
        architecture: ModelShape,
        roles: Sequence[tuple[Role, ...]] | None = None,
    ) -> None:
        self.workload, self.config, self.architecture = workload, config, architecture
        self.roles = [source.config.objective.roles.all for source in config.sources] if roles is None else list(roles)
        size = config.training.global_batch_size
        available = len(workload.responses["chosen"])
        generator = np.random.default_rng(_SEED)
        if available < size:
            raise UserError(
                f"training.global_batch_size={size}: more than the {available} triplets of {workload.source}; lower it"
            )
        self.rows = generator.permutation(available)[:size]
        if workload.rows_of_sources:
            weights = [source.weight for source in config.sources]
            self.rows = Stream(workload.rows_of_sources, weights, _SEED).rows(0, size)
        self._sizes_by_rule: dict[tuple[int, bool], TripletSizes] = {}
        self._plans: dict[tuple[int, ...], RankPacks] = {}
        self._batches: dict[tuple[tuple[int, ...], int, int], BatchShape] = {}
        self._shapes: dict[tuple[Any, ...], PackShape] = {}

    def largest_triplet(self, multiple: int, pack_multiple: int, share_prompts: bool) -> int:
        """Padded tokens of the largest triplet in a pack of its own; see `pack_shape` for the arguments."""
        return int(padded_lengths(self._sizes(multiple, share_prompts).padded_tokens.max(), pack_multiple))

    def pack(self, config: Config, data_parallel_size: int) -> BatchShape:
        """The batch under a layout.

        Raises UserError in the same cases as the trainer: a triplet over the budget, a batch that does not divide.
        """
        rules, budget = _PackingRules.of(config), config.data.max_tokens_per_pack
        multiple, pack_multiple, cp = rules.sequence_multiple, rules.pack_multiple, rules.cp
        check_batch_size(config.training.global_batch_size, data_parallel_size, rules.packs_multiple)
        if (largest := self.largest_triplet(multiple, pack_multiple, rules.share_prompts)) > budget:
            raise UserError(
                f"the largest triplet needs {largest:,} padded tokens (multiples of {pack_multiple}), more than "
                f"data.max_tokens_per_pack={budget}; raise it to that"
            )
        wanted = layout.wanted_packs(config.parallel.pipeline_model_parallel_size)
        key = (multiple, rules.share_prompts, rules.max_tokens, rules.packs_multiple, wanted, data_parallel_size)
        if (key, pack_multiple, cp) not in self._batches:
            if key not in self._plans:
                self._plans[key] = self._plan(*key)
            self._batches[key, pack_multiple, cp] = self._batch(self._plans[key], rules)
        return self._batches[key, pack_multiple, cp]

    def single_pass(self, config: Config, data_parallel_size: int, source: int = 0) -> PassShape:
        """The reference model's pass over all triplets of a source, under a layout that `pack` accepts."""
        rules = _PackingRules.of(config)
        rows = np.random.default_rng(_SEED).permutation(self.workload.rows(source))[:_SAMPLE]
        whole = self.workload.size(source) / len(rows)
        size = config.parallel.pipeline_model_parallel_size
        wanted = layout.packs_per_part(size) if size > 1 else 1
        share = {"num_ranks": data_parallel_size, "packs_multiple": rules.packs_multiple, "wanted_packs": wanted}
        if whole > 1:  # the sample is a part of a long pass, which need not divide evenly
            share = {"num_ranks": 1, "wanted_packs": math.ceil(data_parallel_size * wanted / whole)}
        sizes = self._sizes(rules.sequence_multiple, rules.share_prompts)
        planned = plan_single_pass(
            sizes.take(rows),
            max_tokens=rules.max_tokens,
            max_triplets=self.config.data.max_triplets_per_pack,
            **share,
        )
        return PassShape(
            tuple(self._shape(rows[pack], rules) for pack in planned),
            math.ceil(len(planned) * whole),
        )

    def unpadded_sizes(self, share_prompts: bool) -> TripletSizes:
        """Of the batch's triplets."""
        return self._sizes(1, share_prompts).take(self.rows)

    def _sizes(self, multiple: int, share_prompts: bool) -> TripletSizes:
        if (multiple, share_prompts) not in self._sizes_by_rule:
            self._sizes_by_rule[multiple, share_prompts] = TripletSizes.join(
                [self._sizes_of(source, multiple, share_prompts) for source in range(len(self.roles))]
            )
        return self._sizes_by_rule[multiple, share_prompts]

    def _sizes_of(self, source: int, multiple: int, share_prompts: bool) -> TripletSizes:
        rows, roles = self.workload.rows(source), self.roles[source]
        if not roles:
            return TripletSizes(*np.zeros((len(fields(TripletSizes)), len(rows)), dtype=np.int64))
        prompts = {name: lengths[rows] for name, lengths in self.workload.prompts.items()}
        responses = {name: lengths[rows] for name, lengths in self.workload.responses.items()}
        return triplet_sizes(prompts, responses, roles, multiple, self.architecture, share_prompts=share_prompts)

    def _plan(self, multiple: int, share_prompts: bool, budget: int, packs: int, wanted: int, ranks: int) -> RankPacks:
        return plan_global_batch(
            self._sizes(multiple, share_prompts).select(self.rows),
            max_tokens=budget,
            max_triplets=self.config.data.max_triplets_per_pack,
            num_ranks=ranks,
            packs_multiple=packs,
            wanted_packs=wanted,
        )

    def _batch(self, planned: RankPacks, rules: _PackingRules) -> BatchShape:
        sizes = self._sizes(rules.sequence_multiple, rules.share_prompts)
        loads = [sum(int(sizes.cost[self.rows[pack]].sum()) for pack in rank) for rank in planned]
        heaviest = planned[loads.index(max(loads))]
        packs = [self.rows[pack] for rank in planned for pack in rank]
        positions = sum(int(padded_lengths(sizes.padded_tokens[rows].sum(), rules.pack_multiple)) for rows in packs)
        return BatchShape(
            heaviest_rank=tuple(self._shape(self.rows[pack], rules) for pack in heaviest),
            num_triplets=len(self.rows),
            num_packs=len(packs),
            pad_waste=1 - int(sizes.tokens[self.rows].sum()) / positions,
            balance=sum(loads) / len(loads) / max(loads),
        )

    def _shape(self, rows: IntArray, rules: _PackingRules) -> PackShape:
        columns = {**self.workload.prompts, **self.workload.responses}
        ends = np.cumsum(self.workload.rows_of_sources or (len(self.workload.responses["chosen"]),))
        sources = np.searchsorted(ends, rows, side="right")
        order = np.argsort(sources, kind="stable")  # as in a pack
        rows, roles = rows[order], [self.roles[source] for source in sources[order]]
        triplets = [{name: int(column[row]) for name, column in columns.items()} for row in rows]
        figures = rules.sequence_multiple, rules.pack_multiple, rules.cp
        # Of stated lengths, most packs are alike.
        key = (*figures, rules.share_prompts, *roles, *(tuple(triplet.values()) for triplet in triplets))
        if key not in self._shapes:
            self._shapes[key] = pack_shape(triplets, roles, *figures, share_prompts=rules.share_prompts)
        return self._shapes[key]


def pack_shape(
    triplets: Sequence[Mapping[str, int]],
    roles: Sequence[tuple[Role, ...]],
    multiple: int,
    pack_multiple: int,
    cp: int,
    *,
    share_prompts: bool,
) -> PackShape:
    """The shape of one pack.

    Args:
        triplets: tokens by prompt (`short`, `long`) and answer (`chosen`, `rejected`).
        roles: the sequences of each triplet.
        multiple: the length of each block is padded to a multiple of this.
        pack_multiple: the length of the pack is padded to a multiple of this.
        cp: context-parallel size.
        share_prompts: whether responses behind the same prompt share it.
    """
    lengths = [
        (triplet[own[group[0]].context], [triplet[own[role].response] for role in group])
        for triplet, own in zip(triplets, roles, strict=True)
        for group in prompt_groups(own, share_prompts)
    ]
    blocks = layout_blocks(lengths, multiple, pack_multiple)
    sequences = [block.prompt + np.array(block.padded_responses) for block in blocks]
    spans = []
    for block in blocks:
        for first, last in pairwise(block.ends):
            spans += [(block.start, block.end, *run) for run in ((block.ends[0] - 1, block.ends[0]), (first, last - 1))]
    return PackShape(
        padded_tokens=blocks[-1].end,
        squares=sum(int(attended_squares(*each)) for each in zip((b.prompt for b in blocks), sequences, strict=True)),
        tokens=sum(block.tokens for block in blocks),
        response_rows=_most_rows(np.array(spans), cp),
        longest=max(int(each.max()) for each in sequences),
        shares_prompts=len(blocks) < sum(map(len, roles)),
        attended_keys=max(
            sum(len(run) for _, keys in attended_runs(blocks, cp, rank) for run in keys) for rank in range(cp)
        ),
        triplets=tuple(dict(triplet) for triplet in triplets),
        roles=tuple(map(tuple, roles)),
    )


def _most_rows(spans_X4: IntArray, cp: int) -> int:
    """Response rows on the context-parallel rank that has most of them.

    Args:
        spans_X4: for each run of rows, start and end of its block, and its own start and end.
    """
    start, end, low, high = spans_X4.T[:, :, None]
    chunk, number_C = (end - start) // (2 * cp), np.arange(2 * cp)[None, :]
    inside = np.minimum(high, start + (number_C + 1) * chunk) - np.maximum(low, start + number_C * chunk)
    rows_C = np.maximum(inside, 0).sum(axis=0)
    return int((rows_C[:cp] + rows_C[cp:][::-1]).max())  # rank r holds chunks r and 2 x CP - 1 - r
