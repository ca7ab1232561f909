"""Reads the list of stored tensors of a Megatron distributed checkpoint without running code of it.

The list (`.metadata`) is a pickle that torch's distributed checkpointing writes. It is read by an unpickler that knows
no class but those that belong there.

A piece of a tensor in a Megatron distributed checkpoint, read on the pages of its file.

torch writes every piece as `torch.save` does, many in one file. Loading one copies its numbers, to memory that the
kernel must clear first; mapped, they are where the kernel has read them, and those that nobody asks for are not read.

Reads parameters of a Megatron distributed checkpoint, without building its model and without running code of it.

Megatron stores the layers of a model stacked in one tensor, [layers, ...], cut into pieces as the
ranks that wrote it held them.
"""

import io
import math
import pickle
from collections.abc import Collection
from dataclasses import dataclass
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import METADATA, check_megatron_checkpoint
from megatron_solopo.checkpoint.huggingface_weights import DTYPES, check_tensor_names
from megatron_solopo.checkpoint.mapping import ReadRows, Rule, megatron_shape, rules
from megatron_solopo.errors import UserError

_SAFE_CLASSES = {
    "torch": {"Size", "device"},  # and every dtype
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
}


def read_metadata(checkpoint: Path) -> Metadata:
    """Raises UserError, naming the file, where it is damaged or holds what has no place in it."""
    file = checkpoint / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes()), file).load()
    except _Refused:
        raise
    # A torn pickle raises whatever its bytes lead to.
    except Exception as error:
        raise UserError(f"{file}: cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise UserError(f"{file}: is no list of stored tensors")
    return metadata


class _Refused(UserError):
    """The list of pieces holds what has no place in one."""


class _Unpickler(pickle._Unpickler):
    """Makes instances of the classes above and nothing else. In Python, where each step of it can be replaced."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO, file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _SAFE_CLASSES.get(module, ()):
            raise _Refused(f"{self._file}: names {module}.{name}, which has no place in a checkpoint; it was not run")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Sets the attributes of an instance, never those of a class or a function, which all others share."""
        target = self.stack[-2]
        if isinstance(target, type) or callable(target):
            raise _Refused(
                f"{self._file}: would change {target!r}, which has no place in a checkpoint; it was not done"
            )
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


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

        Raises UserError, naming the file, where something else is stored there. A file that somebody cuts short while
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
                raise UserError(
                    f"{self.file}: {self.key} cannot be read: {problem}; the checkpoint is damaged"
                ) from None

    def _stored(self, stream: BinaryIO) -> tuple[Tensor, int]:
        """What is stored, on the meta device, and the byte of the file where its numbers begin."""
        view = _create_file_view(stream, self.start, self.length)
        like = torch.load(view, map_location="meta", weights_only=True)
        if (tuple(like.shape), like.dtype) != (self.shape, self.dtype):
            raise UserError(f"holds {like.dtype} of shape {tuple(like.shape)} instead of {self.dtype} of {self.shape}")
        view.seek(0)
        start = self.start + torch._C.PyTorchFileReader(view).get_record_offset("data/0")
        if start + like.untyped_storage().nbytes() > self.start + self.length:
            raise UserError("it ends before its last number")
        return like, start


THREADS = 2
"""Convert side by side: while one waits for the disk or for the kernel, the other computes."""
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


class MegatronDirectory:
    """The model's tensors in a Megatron checkpoint; the optimizer's state and everything else is passed over."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if `path` is no checkpoint, or if its list of pieces or one of its files is damaged."""
        check_megatron_checkpoint(path, "--checkpoint")
        self.path = path
        metadata = read_metadata(path)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(_MODEL_KEYS)
        }
        self._pieces = self._find_pieces(metadata)
        self._check_files()

    def pieces(self) -> Collection[Piece]:
        """Every stored piece of every model tensor."""
        return self._pieces.values()

    def _find_pieces(self, metadata: Metadata) -> dict[MetadataIndex, Piece]:
        return {
            MetadataIndex(key, chunk.offsets): self._find_piece(metadata, key, chunk)
            for key, entry in self.tensors.items()
            for chunk in entry.chunks
        }

    def _find_piece(self, metadata: Metadata, key: str, chunk: ChunkStorageMetadata) -> Piece:
        info = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise UserError(f"{self.path / METADATA}: says of no file that it holds {key} {chunk.offsets}")
        if Path(info.relative_path).name != info.relative_path:
            raise UserError(
                f"{self.path / METADATA}: says that {key} lies in {info.relative_path}, outside the checkpoint"
            )
        if getattr(info, "transform_descriptors", None):
            raise UserError(
                f"{self.path / METADATA}: says that {key} is stored through {', '.join(info.transform_descriptors)}; "
                "supported: plain files"
            )
        place, dtype = self.path / info.relative_path, self.tensors[key].properties.dtype
        return Piece(key, tuple(chunk.offsets), tuple(chunk.sizes), dtype, place, info.offset, info.length)

    def _check_files(self) -> None:
        sizes: dict[Path, int] = {}
        for piece in self.pieces():
            if piece.file not in sizes:
                sizes[piece.file] = piece.file.stat().st_size if piece.file.is_file() else -1
            if sizes[piece.file] < piece.start + piece.length:
                problem = "is missing" if sizes[piece.file] < 0 else f"is cut short at {sizes[piece.file]:,} bytes"
                raise UserError(f"{piece.file}: {problem}, {piece.key} was stored there; the checkpoint is damaged")

    def check(self, architecture: Architecture) -> None:
        """Compare with what the config asks for; a vocabulary may be padded.

        Raises UserError naming missing, unexpected or misshapen tensors, or a precision that is not supported.
        """
        expected = {}
        for rule in rules(architecture).values():
            key, layer = rule.stored_at
            expected[key] = self._expected_shape(rule, architecture, layer)
        check_tensor_names(self.path, self.tensors, expected, architecture)
        for key, shape in expected.items():
            found, dtype = tuple(self.tensors[key].size), self.tensors[key].properties.dtype
            if found != shape:
                raise UserError(f"{self.path}: {key} has shape {found}, but config.json asks for {shape}")
            if dtype not in DTYPES.values():
                raise UserError(f"{self.path}: {key} is stored as {dtype}; supported: {', '.join(DTYPES)}")

    def _expected_shape(self, rule: Rule, architecture: Architecture, layer: int | None) -> tuple[int, ...]:
        shape = megatron_shape(rule, architecture)
        if layer is not None:
            return (architecture.num_layers, *shape)
        stored = self.tensors.get(rule.stored_at[0])
        padded = rule.fusion == "vocab" and stored is not None and stored.size[0] > shape[0]
        return (stored.size[0], *shape[1:]) if padded and stored is not None else shape

    def dtype(self, rule: Rule) -> torch.dtype:
        """The precision that a parameter is stored in."""
        found: torch.dtype = self.tensors[rule.stored_at[0]].properties.dtype
        return found

    def rows_of(self, rule: Rule) -> ReadRows:
        """A function that reads rows of one parameter, in the precision they are stored in."""
        key, layer = rule.stored_at
        others = list(self.tensors[key].size)[1 if layer is None else 2 :]

        def read(start: int, end: int) -> Tensor:
            offsets, sizes = [start, *[0] * len(others)], [end - start, *others]
            if layer is None:
                return self._read(key, offsets, sizes)
            return self._read(key, [layer, *offsets], [1, *sizes])[0]

        return read

    def _read(self, key: str, offsets: list[int], sizes: list[int]) -> Tensor:
        """One box of a tensor; memory is taken only where several pieces are joined."""
        entry = self.tensors[key]
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [box])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise UserError(f"{self.path}: {key} is not stored whole; the checkpoint is damaged")
        parts = [_part(self._pieces[item.storage_index].read(), item.storage_offsets, item.lengths) for item in items]
        if len(parts) == 1:
            return parts[0]
        joined = torch.empty(sizes, dtype=entry.properties.dtype)
        for item, part in zip(items, parts, strict=True):
            _part(joined, item.dest_offsets, item.lengths).copy_(part)
        return joined


def _part(tensor: Tensor, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    return tensor[tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))]
