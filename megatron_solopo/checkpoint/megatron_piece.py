"""A piece of a tensor in a Megatron distributed checkpoint, read on the pages of its file.

torch writes every piece as `torch.save` does, many in one file. Loading one copies its numbers, to memory that the
kernel must clear first; mapped, they are where the kernel has read them, and those that nobody asks for are not read.
"""

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

        Raises ValueError, naming the file, where something else is stored there. A file that somebody cuts short while
        it is mapped ends the process (SIGBUS), as it does with safetensors.
        """
        with self.file.open("rb") as stream:
            # What is torn leads torch and its unpickler to any exception.
            try:
                like, start = self._stored(stream)
                nbytes = like.untyped_storage().nbytes()
                first = start // ALLOCATIONGRANULARITY * ALLOCATIONGRANULARITY
                pages = mmap(stream.fileno(), start + nbytes - first, access=ACCESS_COPY, offset=first)
                count = nbytes // self.dtype.itemsize
                numbers = torch.frombuffer(pages, dtype=self.dtype, count=count, offset=start - first)
                return numbers.as_strided(like.shape, like.stride(), like.storage_offset())
            except Exception as error:
                problem = " ".join(str(error).split())[:200] or type(error).__name__
                raise ValueError(
                    f"{self.file}: {self.key} cannot be read: {problem}; the checkpoint is damaged"
                ) from None

    def _stored(self, stream: BinaryIO) -> tuple[Tensor, int]:
        """What is stored, on the meta device, and the byte of the file where its numbers begin."""
        view = _create_file_view(stream, self.start, self.length)
        like = torch.load(view, map_location="meta", weights_only=True)
        if (tuple(like.shape), like.dtype) != (self.shape, self.dtype):
            raise ValueError(f"holds {like.dtype} of shape {tuple(like.shape)} instead of {self.dtype} of {self.shape}")
        view.seek(0)
        start = self.start + torch._C.PyTorchFileReader(view).get_record_offset("data/0")
        if start + like.untyped_storage().nbytes() > self.start + self.length:
            raise ValueError("it ends before its last number")
        return like, start
