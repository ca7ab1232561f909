"""Blocks of a pack: a prompt and the responses that share it, and which keys the queries of a rank see.

A response sees the prompt and itself. Context parallelism cuts every block, see `architecture.layout.context_chunks`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from megatron_solopo.architecture.layout import context_chunks


@dataclass(frozen=True)
class Block:
    """A block of a pack. All numbers are positions of the pack."""

    start: int
    ends: tuple[int, ...]
    """Of the prompt, and of each response. They follow each other without a gap."""
    end: int
    """With padding, which continues the last response."""

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.ends[0] - self.start

    @property
    def response_starts(self) -> tuple[int, ...]:
        """Where each response begins."""
        return self.ends[:-1]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return self.ends[-1] - self.start

    @property
    def padded_responses(self) -> list[int]:
        """Tokens of each response, the last one's with padding."""
        return [end - start for start, end in pairwise((*self.response_starts, self.end))]


def layout_blocks(
    lengths: Iterable[tuple[int, Sequence[int]]], sequence_multiple: int, pack_multiple: int = 1
) -> tuple[Block, ...]:
    """The blocks of a pack, one behind the other.

    Args:
        lengths: of each block, the tokens of its prompt and of its responses.
        sequence_multiple: Each block is padded at its end to a multiple of this.
        pack_multiple: The pack is padded to a multiple of this, at the end of its last block.
    """
    blocks: list[Block] = []
    start = 0
    for prompt, responses in lengths:
        ends = tuple(accumulate(responses, initial=start + prompt))
        padded = -(-(ends[-1] - start) // sequence_multiple) * sequence_multiple
        blocks.append(Block(start, ends, start + padded))
        start = blocks[-1].end
    blocks[-1] = replace(blocks[-1], end=-(-start // pack_multiple) * pack_multiple)
    return tuple(blocks)


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
                    prompt = [range(block.start, block.ends[0])] if branch > block.start else []
                    yield range(first, last), [*prompt, range(branch, last)]
