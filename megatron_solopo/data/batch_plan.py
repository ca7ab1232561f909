"""The plan of a global batch: which triplets share a pack, and which rank computes which packs.

A triplet yields blocks: a prompt, and the responses behind it. Each block is padded at its end to a multiple that the
parallel layout needs, so budgets count padded tokens.

1. Best-fit decreasing packs the triplets by padded tokens, so that few packs are needed.
2. The costliest packs are divided until their number is a multiple of the number of ranks. Data-parallel ranks step
   together, and an interleaved pipeline needs a multiple of its own size. A pipeline also waits less with more packs.
3. Packs go to ranks, costliest first, each to the rank with the least cost so far (longest processing time first).
4. The costliest rank exchanges triplets with the others as long as that lowers its cost.

All arithmetic is on integers, and positions break ties, so all ranks make the same plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.architecture.flops import attended_squares, forward_flops
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.config import Role, prompt_groups
from megatron_solopo.errors import UserError

IntArray = NDArray[np.int64]

_FLOPS_PER_COST = 1e6
"""Costs are integers. In millions of FLOPs, those of a batch of long sequences fit in 64 bits."""


def padded_lengths(lengths: IntArray, multiple: int) -> IntArray:
    """Round each length up to the next multiple."""
    return -(-lengths // multiple) * multiple


class TripletSize(NamedTuple):
    """The space and the time that one triplet takes in its pack."""

    padded_tokens: int
    """Positions in the pack: every block rounded up to the multiple."""
    tokens: int
    """Prompt and response tokens of all its blocks, without padding."""
    cost: int
    """Forward FLOPs of all its blocks with their padding, in millions."""


@dataclass(frozen=True, eq=False)
class TripletSizes:
    """Sizes of D triplets as int64 arrays [D]: one for each field of `TripletSize`, and others."""

    padded_tokens: IntArray
    tokens: IntArray
    cost: IntArray
    sequence_tokens: IntArray
    """Tokens of all sequences, as if no prompt was shared."""
    squares: IntArray
    """Of all blocks with their padding, see `architecture.flops.attended_squares`."""
    response_tokens: IntArray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def flops(self) -> float:
        """Forward FLOPs of all triplets."""
        return float(self.cost.sum()) * _FLOPS_PER_COST

    def take(self, rows: IntArray) -> "TripletSizes":
        """The arrays of some rows, in their order."""
        return TripletSizes(*(getattr(self, each.name)[rows] for each in fields(self)))

    @staticmethod
    def join(parts: Sequence["TripletSizes"]) -> "TripletSizes":
        """The arrays of all parts, one behind the other."""
        names = [each.name for each in fields(TripletSizes)]
        return TripletSizes(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def select(self, rows: IntArray) -> list[TripletSize]:
        """The sizes of some rows, in their order."""
        columns = (self.padded_tokens[rows], self.tokens[rows], self.cost[rows])
        return [TripletSize(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def triplet_sizes(
    prompt_lengths: Mapping[str, IntArray],
    response_lengths: Mapping[str, IntArray],
    roles: Sequence[Role],
    sequence_multiple: int,
    architecture: ModelShape,
    *,
    share_prompts: bool,
) -> TripletSizes:
    """Compute the sizes of all triplets from token counts.

    Args:
        prompt_lengths: Context (`short`, `long`) -> tokens of its prompt [D].
        response_lengths: Response (`chosen`, `rejected`) -> its tokens [D].
        roles: The sequences of each triplet.
        sequence_multiple: Each block is padded to a multiple of this.
        architecture: The model, which decides how many FLOPs a sequence takes.
        share_prompts: Whether responses behind the same prompt share it.
    """
    responses_RD = np.stack([response_lengths[role.response] for role in roles]).astype(np.int64)
    tokens_D, padded_D, squares_D, sequence_tokens_D = np.zeros((4, responses_RD.shape[1]), dtype=np.int64)
    for group in prompt_groups(roles, share_prompts):
        prompt_D = np.asarray(prompt_lengths[roles[group[0]].context], dtype=np.int64)
        responses_GD = responses_RD[list(group)]
        length_D = prompt_D + responses_GD.sum(axis=0)
        sequence_tokens_D += length_D + (len(group) - 1) * prompt_D
        block_D = padded_lengths(length_D, sequence_multiple)
        responses_GD[-1] += block_D - length_D  # padding continues the last response
        tokens_D += length_D
        padded_D += block_D
        squares_D += attended_squares(prompt_D, prompt_D + responses_GD)
    response_tokens_D = responses_RD.sum(axis=0)
    flops_D = (
        forward_flops(architecture, 1, 0, 0).total * padded_D
        + forward_flops(architecture, 0, 1, 0).total * squares_D
        + forward_flops(architecture, 0, 0, 1).total * response_tokens_D
    )
    # Rounded up, so that every triplet costs something.
    cost_D = np.ceil(flops_D / _FLOPS_PER_COST).astype(np.int64)
    return TripletSizes(padded_D, tokens_D, cost_D, sequence_tokens_D, squares_D, response_tokens_D)


RankPacks = list[list[list[int]]]
"""Triplet positions, indexed `[rank][pack][triplet]`."""

_WINDOW = 1024
"""Neighbouring triplets of a single pass that are packed together."""

_SETTLED = 1000
"""Step 4 stops when it can lower the cost of the costliest rank by no more than 1/1000 of the mean cost."""


def plan_global_batch(
    sizes: Sequence[TripletSize],
    *,
    max_tokens: int,
    max_triplets: int | None,
    num_ranks: int,
    packs_multiple: int = 1,
    wanted_packs: int = 1,
) -> RankPacks:
    """Pack the triplets of one optimizer step and distribute the packs over the data-parallel ranks.

    Args:
        sizes: One for each triplet of the batch. The result holds positions in this sequence.
        max_tokens: Padded tokens that one pack may hold.
        max_triplets: Triplets that one pack may hold. None: any number.
        num_ranks: Data-parallel ranks.
        packs_multiple: Every rank gets a multiple of this number of packs.
        wanted_packs: Every rank gets at least this number of packs if the batch has enough triplets.

    Returns:
        Positions indexed `[rank][pack][triplet]`. Each position occurs once. Every rank has the same number of packs,
        and no pack is empty. The costliest pack of each rank comes first, so that a lack of memory shows early.

    Raises UserError if a triplet is larger than `max_tokens`, or if there are too few triplets to give each rank the
    same number of packs.
    """
    _check_budget(sizes, max_tokens)
    share = num_ranks * packs_multiple
    packs = _best_fit_decreasing(sizes, max_tokens, max_triplets)
    target = max(1, -(-len(packs) // share)) * share
    target = max(target, _most_packs(len(sizes), share, num_ranks * wanted_packs))
    if target > len(sizes):
        raise UserError(
            f"a batch of {len(sizes)} triplets cannot give {num_ranks} data-parallel ranks the same number of packs "
            f"(a multiple of {packs_multiple} each): {target} triplets are needed; make training.global_batch_size "
            f"a multiple of {share} or change parallel.*"
        )
    return _share_out(_split(packs, sizes, target), sizes, max_tokens, max_triplets, num_ranks)


def check_batch_size(global_batch_size: int, num_ranks: int, packs_multiple: int) -> None:
    """Raise UserError if some batch of this size might not divide evenly over the ranks.

    The arguments are those of `plan_global_batch`.
    """
    share = num_ranks * packs_multiple
    if global_batch_size % share:
        raise UserError(
            f"training.global_batch_size={global_batch_size}: must be a multiple of {share} "
            f"({num_ranks} data-parallel ranks x a multiple of {packs_multiple} packs on each); "
            f"change it or parallel.*"
        )


def packs_needed(
    sizes: Sequence[TripletSize],
    *,
    max_tokens: int,
    max_triplets: int | None,
    num_ranks: int,
) -> int:
    """Least number of packs that each rank needs for these triplets. `plan_global_batch` uses the next multiple."""
    return -(-len(_best_fit_decreasing(sizes, max_tokens, max_triplets)) // num_ranks)


def plan_single_pass(
    sizes: TripletSizes,
    *,
    max_tokens: int,
    max_triplets: int | None,
    num_ranks: int,
    packs_multiple: int = 1,
    wanted_packs: int = 1,
) -> list[IntArray]:
    """The packs of a pass over any number of triplets, as arrays of rows. Each row occurs once.

    Neighbours in the data set share packs, so the time to plan grows with the number of triplets and no faster. What
    has been done does not change the packs. So a pass that is continued runs the same packs as one that never stopped.

    Args:
        wanted_packs: Every rank gets at least about this number of packs if there are enough triplets.
        (The others: see `plan_global_batch`.)

    Raises UserError if a triplet is larger than `max_tokens`.
    """
    count, share = len(sizes), num_ranks * packs_multiple
    packs = []
    for start in range(0, count, _WINDOW):
        rows = np.arange(start, min(start + _WINDOW, count))
        window = sizes.select(rows)
        _check_budget(window, max_tokens, start)
        found = _best_fit_decreasing(window, max_tokens, max_triplets)
        # A few packs more or less change little in a long pass. A short one is shared out evenly.
        multiple = share if count <= _WINDOW else 1
        wanted = -(-num_ranks * wanted_packs * len(rows) // count)
        target = max(-(-len(found) // multiple) * multiple, _most_packs(len(rows), multiple, wanted))
        packs += [rows[pack] for pack in _split(found, window, min(target, len(rows)))]
    return packs


@dataclass(frozen=True, eq=False)
class PassPart:
    """Packs of a single pass that run without a break, by the rank that runs them."""

    packs: IntArray
    """Numbers of packs, [ranks, places]."""
    counted: NDArray[np.bool_]
    """Whether each of them counts. A rank with too few packs repeats the cheapest one, which then does not count."""


def packs_in_part(num_packs: int, *, num_ranks: int, packs_multiple: int, packs_per_part: int) -> int:
    """Packs of all ranks in each part of a single pass but the last; the arguments are those of `share_out_pass`."""
    share = num_ranks * packs_multiple
    num_parts = max(1, -(-num_packs // (num_ranks * packs_per_part)))
    return max(share, -(-num_packs // (num_parts * share)) * share)


def share_out_pass(
    costs: Sequence[int], *, num_ranks: int, packs_multiple: int = 1, packs_per_part: int = 1
) -> list[PassPart]:
    """Share out the packs of a single pass.

    Args:
        costs: Cost of each pack. The result holds positions in this sequence.
        packs_per_part: No part has more packs on each rank, rounded up to `packs_multiple`. Parts are about equal.
        (The others: see `plan_global_batch`.)

    Within a part, packs at the same place of all ranks cost about the same, the costliest first. At every place, the
    rank with the least cost so far gets the costliest pack.
    """
    share = num_ranks * packs_multiple
    length = packs_in_part(
        len(costs), num_ranks=num_ranks, packs_multiple=packs_multiple, packs_per_part=packs_per_part
    )
    parts = []
    for start in range(0, len(costs), length):
        order = sorted(range(start, min(start + length, len(costs))), key=lambda number: (-costs[number], number))
        numbers = np.array([*order, *[order[-1]] * (-len(order) % share)]).reshape(-1, num_ranks)
        counted = (np.arange(numbers.size) < len(order)).reshape(-1, num_ranks)
        loads = np.zeros(num_ranks, dtype=np.int64)
        for place, row in enumerate(numbers):
            lightest = loads.argsort(kind="stable").argsort()
            numbers[place], counted[place] = row[lightest], counted[place][lightest]
            loads += [costs[number] for number in numbers[place]]
        parts.append(PassPart(numbers.T, counted.T))
    return parts


def _most_packs(num_triplets: int, share: int, wanted: int) -> int:
    """The multiple of `share` that reaches `wanted` packs, or the largest one for which every pack has a triplet."""
    return min(-(-wanted // share), num_triplets // share) * share


def _check_budget(sizes: Sequence[TripletSize], max_tokens: int, first: int = 0) -> None:
    for index, size in enumerate(sizes, first):
        if size.padded_tokens > max_tokens:
            raise UserError(
                f"triplet {index} needs {size.padded_tokens} padded tokens, more than one pack's {max_tokens}; "
                f"raise data.max_tokens_per_pack"
            )


def _cost(pack: Sequence[int], sizes: Sequence[TripletSize]) -> int:
    return sum(sizes[position].cost for position in pack)


def _best_fit_decreasing(sizes: Sequence[TripletSize], max_tokens: int, max_triplets: int | None) -> list[list[int]]:
    """Put each triplet, the largest first, into the fullest pack that has room for it."""
    limit = len(sizes) if max_triplets is None else max_triplets
    packs: list[list[int]] = []
    free = np.empty(len(sizes), dtype=np.int64)
    for position in sorted(range(len(sizes)), key=lambda i: (-sizes[i].padded_tokens, i)):
        need = sizes[position].padded_tokens
        left = free[: len(packs)]
        fitting = np.where(left >= need, left, max_tokens + 1)
        fullest = int(fitting.argmin()) if packs else 0
        if not packs or fitting[fullest] > max_tokens:
            fullest = len(packs)
            packs.append([])
            free[fullest] = max_tokens
        packs[fullest].append(position)
        free[fullest] -= need
        if len(packs[fullest]) == limit:
            free[fullest] = -1
    return packs


def _split(packs: list[list[int]], sizes: Sequence[TripletSize], target: int) -> list[list[int]]:
    """Halve the costliest pack that holds two or more triplets until there are `target` packs."""
    packs = list(packs)
    costs = [_cost(pack, sizes) for pack in packs]
    while len(packs) < target:
        divisible = [cost if len(pack) > 1 else -1 for pack, cost in zip(packs, costs, strict=True)]
        costliest = divisible.index(max(divisible))
        halves: tuple[list[int], list[int]] = ([], [])
        for position in sorted(packs[costliest], key=lambda i: (-sizes[i].cost, i)):
            min(halves, key=lambda half: _cost(half, sizes)).append(position)
        packs[costliest : costliest + 1] = halves
        costs[costliest : costliest + 1] = [_cost(half, sizes) for half in halves]
    return packs


def _share_out(
    packs: list[list[int]], sizes: Sequence[TripletSize], max_tokens: int, max_triplets: int | None, num_ranks: int
) -> RankPacks:
    """Steps 3 and 4: give packs to ranks, then exchange triplets."""
    packs_per_rank = -(-len(packs) // num_ranks)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for number in sorted(range(len(packs)), key=lambda i: (-_cost(packs[i], sizes), i)):
        open_ranks = [rank for rank in range(num_ranks) if len(ranks[rank]) < packs_per_rank]
        lightest = min(open_ranks, key=lambda rank: loads[rank])
        ranks[lightest].append(number)
        loads[lightest] += _cost(packs[number], sizes)

    exchange = _Exchange.start(packs, ranks, sizes, max_tokens, max_triplets)
    while exchange.improve():
        pass
    plan = exchange.ranks()
    return [sorted(rank, key=lambda pack: (-_cost(pack, sizes), pack)) for rank in plan]


@dataclass
class _Exchange:
    """Exchanges single triplets between ranks. No pack becomes too large or empty.

    There are n triplets and K packs. Entries n to n + K of the arrays [n + K] are phantom triplets, one for each pack,
    with size 0 and cost 0. An exchange with a phantom moves a triplet to the phantom's pack.
    """

    tokens: IntArray
    cost: IntArray
    pack_of: IntArray
    """Pack of each entry [n + K]."""
    rank_of: IntArray
    """Rank of each pack [K]."""
    free: IntArray
    """Tokens left in each pack [K]."""
    count: IntArray
    """Triplets in each pack [K]."""
    load: IntArray
    """Cost of each rank."""
    max_triplets: int

    @classmethod
    def start(
        cls,
        packs: list[list[int]],
        ranks: list[list[int]],
        sizes: Sequence[TripletSize],
        max_tokens: int,
        max_triplets: int | None,
    ) -> "_Exchange":
        n, num_packs = len(sizes), len(packs)
        phantoms = np.zeros(num_packs, dtype=np.int64)
        tokens = np.concatenate([np.array([size.padded_tokens for size in sizes], dtype=np.int64), phantoms])
        cost = np.concatenate([np.array([size.cost for size in sizes], dtype=np.int64), phantoms])
        pack_of = np.concatenate([np.empty(n, dtype=np.int64), np.arange(num_packs)])
        free = np.full(num_packs, max_tokens, dtype=np.int64)
        for number, pack in enumerate(packs):
            pack_of[pack] = number
            free[number] -= tokens[pack].sum()
        rank_of = np.empty(num_packs, dtype=np.int64)
        load = np.zeros(len(ranks), dtype=np.int64)
        for rank, numbers in enumerate(ranks):
            rank_of[numbers] = rank
            load[rank] = sum(cost[packs[number]].sum() for number in numbers)
        count = np.array([len(pack) for pack in packs], dtype=np.int64)
        return cls(tokens, cost, pack_of, rank_of, free, count, load, n if max_triplets is None else max_triplets)

    def improve(self) -> bool:
        """Make the exchange after which the costlier of the two ranks is cheapest. False if none is worth it."""
        num_triplets = len(self.tokens) - len(self.free)
        costliest = int(self.load.argmax())
        ranks = self.rank_of[self.pack_of]
        ours_I = np.flatnonzero(ranks[:num_triplets] == costliest)
        gain_IJ = self.cost[ours_I, None] - self.cost[None, :]
        after_IJ = np.maximum(self.load[costliest] - gain_IJ, self.load[ranks][None, :] + gain_IJ)
        shift_IJ = self.tokens[ours_I, None] - self.tokens[None, :]
        packs_I = self.pack_of[ours_I]
        legal_IJ = (
            (ranks != costliest)[None, :]
            & (shift_IJ <= self.free[self.pack_of][None, :])
            & (-shift_IJ <= self.free[packs_I][:, None])
        )
        legal_IJ[:, num_triplets:] &= (self.count[packs_I] > 1)[:, None] & (self.count < self.max_triplets)[None, :]
        after_IJ[~legal_IJ] = np.iinfo(np.int64).max
        i, j = np.unravel_index(after_IJ.argmin(), after_IJ.shape)
        worthwhile = max(1, int(self.load.sum()) // len(self.load) // _SETTLED)
        if after_IJ[i, j] > self.load[costliest] - worthwhile:
            return False
        self._exchange(int(ours_I[i]), int(j))
        return True

    def _exchange(self, ours: int, theirs: int) -> None:
        num_triplets = len(self.tokens) - len(self.free)
        source, target = int(self.pack_of[ours]), int(self.pack_of[theirs])
        shift = self.tokens[ours] - self.tokens[theirs]
        gain = self.cost[ours] - self.cost[theirs]
        self.free[source] += shift
        self.free[target] -= shift
        self.load[self.rank_of[source]] -= gain
        self.load[self.rank_of[target]] += gain
        self.pack_of[ours] = target
        if theirs < num_triplets:
            self.pack_of[theirs] = source
        else:
            self.count[source] -= 1
            self.count[target] += 1

    def ranks(self) -> RankPacks:
        num_triplets = len(self.tokens) - len(self.free)
        packs: list[list[int]] = [[] for _ in self.free]
        for position in range(num_triplets):
            packs[self.pack_of[position]].append(position)
        plan: RankPacks = [[] for _ in self.load]
        for number, pack in enumerate(packs):
            plan[self.rank_of[number]].append(pack)
        return plan
