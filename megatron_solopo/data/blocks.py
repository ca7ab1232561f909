"""Blocks of a pack: a prompt and the responses that share it, and which keys the queries of a rank see.

A response sees the prompt and itself. Context parallelism cuts every block, see `architecture.layout.context_chunks`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_solopo.architecture.layout import context_chunks


@dataclass(frozen=True)
class Block:
    """A block of a pack. All numbers are positions of the pack."""

    start: int
    prompt_end: int
    response_starts: tuple[int, ...]
    """Ascending. The first response follows the prompt."""
    end: int
    """With padding, which continues the last response."""


def attended_runs(blocks: Sequence[Block], size: int, rank: int) -> Iterator[tuple[range, list[range]]]:
    """Runs of the queries of context-parallel rank `rank` of `size`, each with the runs of keys that it sees.

    The mask is causal at the lower right: the last query sees all keys of its runs, the one before sees one key less.
    """
    for block in blocks:
        # Each response behind the first one is a branch of its own. The first continues the prompt.
        branches = [block.start, *block.response_starts[1:], block.end]
        for chunk in context_chunks(block.start, block.end, size, rank):
            for branch, following in pairwise(branches):
                first, last = max(chunk.start, branch), min(chunk.stop, following)
                if first < last:
                    prompt = [range(block.start, block.prompt_end)] if branch > block.start else []
                    yield range(first, last), [*prompt, range(branch, last)]
