"""A piece of a tensor in a Megatron distributed checkpoint, read on the pages of its file.

torch writes every piece as `torch.save` does, many in one file. Loading one copies its numbers, to memory that the
kernel must clear first; mapped, they are where the kernel has read them, and those that nobody asks for are not read.
"""

import pickle
from dataclasses import dataclass
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view


@dataclass(frozen=True)
class Piece:
    """A stored piece of a tensor: bytes [start, start + length) of a file, torch's own format."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    length: int

    def read(self) -> Tensor:
        """The numbers, mapped: of `shape` and `dtype`, with a hold on the file while the tensor lives.

        Raises ValueError, naming the file, where something else is stored there.
        """
        with self.file.open("rb") as stream:
            like, place = self._locate(stream)
            nbytes = like.untyped_storage().nbytes()
            first = place // ALLOCATIONGRANULARITY * ALLOCATIONGRANULARITY
            pages = mmap(stream.fileno(), place + nbytes - first, access=ACCESS_COPY, offset=first)
        numbers = torch.frombuffer(pages, dtype=self.dtype, count=nbytes // self.dtype.itemsize, offset=place - first)
        return numbers.as_strided(like.shape, like.stride(), like.storage_offset())

    def _locate(self, stream: BinaryIO) -> tuple[Tensor, int]:
        """What is stored, on the meta device, and the byte of the file where its numbers begin."""
        try:
            like = torch.load(
                _create_file_view(stream, self.start, self.length), map_location="meta", weights_only=True
            )
            place = self.start + like.untyped_storage()._checkpoint_offset
            found = (tuple(like.shape), like.dtype)
        except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise self._damaged(" ".join(str(error).split())[:200]) from None
        if found != (self.shape, self.dtype):
            raise self._damaged(f"holds {found[1]} of shape {found[0]} instead of {self.dtype} of {self.shape}")
        if place + like.untyped_storage().nbytes() > self.start + self.length:
            raise self._damaged("ends before its last number")
        return like, place

    def _damaged(self, problem: str) -> ValueError:
        return ValueError(f"{self.file}: {self.key} cannot be read: {problem}; the checkpoint is damaged")
