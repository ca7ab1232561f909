"""Global batches as the endless iterator of micro-batches that Megatron-LM's training loop reads."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_solopo.data.loader import GlobalBatch, GlobalBatchLoader
from megatron_solopo.data.packing import Pack


@dataclass(frozen=True, eq=False)
class StepPack:
    """A pack and its place: Megatron-LM's loop tells a forward step neither."""

    pack: Pack
    split: str
    number: int
    """Of this rank's packs of the step, from 0."""
    batch: GlobalBatch
    """The step's."""

    @property
    def is_last(self) -> bool:
        """Whether the step ends with this pack."""
        return self.number == len(self.batch.packs) - 1


class PackStream:
    """`num_packs` packs per global batch, for as many batches as are asked for.

    Megatron-LM fixes the number of micro-batches of a step beforehand: global batch size / (micro-batch
    size x DP). So its micro-batch size is the mean number of triplets in a pack: the triplets of a global
    batch are packed into just that many packs, as even in cost as can be.

    Args:
        loader: with `packs_multiple=num_packs`.
        consumed_triplets: where to start in the loader's stream.
        num_batches: how many batches will be asked for; they are looked at now, by their lengths.

    Raises ValueError if the token budget of a pack is too small for so few packs in one of them.
    """

    def __init__(
        self, loader: GlobalBatchLoader, split: str, num_packs: int, *, consumed_triplets: int, num_batches: int
    ) -> None:
        loader.load_state_dict(loader.state_dict() | {"consumed_triplets": consumed_triplets})
        self._loader, self._split, self._num_packs = loader, split, num_packs
        self._step: Iterator[StepPack] = iter(())
        for start, needed in loader.packs_needed(num_batches):
            self._check(start, needed)

    def __iter__(self) -> "PackStream":
        return self

    def __next__(self) -> StepPack:
        """The next pack."""
        item = next(self._step, None)
        if item is None:
            self._step = self._read()
            item = next(self._step)
        return item

    def _read(self) -> Iterator[StepPack]:
        start = self._loader.consumed_triplets
        batch = self._loader.next_batch()
        self._check(start, len(batch.packs))
        return (StepPack(pack, self._split, number, batch) for number, pack in enumerate(batch.packs))

    def _check(self, start: int, needed: int) -> None:
        if needed > self._num_packs:
            raise ValueError(
                f"the batch of the {self._split} stream that starts with triplet {start} needs {needed} packs on each "
                f"data-parallel rank, but has {self._num_packs} (global batch size / (micro-batch size x DP)): raise "
                "data.max_tokens_per_pack (micro-batch size x the largest triplet always suffices) or "
                "data.max_triplets_per_pack, or lower --micro-batch-size"
            )
