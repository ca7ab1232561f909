"""Reads the model's tensors of a Megatron distributed checkpoint. Neither builds the model nor runs code of the files.

Megatron stacks a parameter of all layers in one tensor, [layers, ...]. The ranks that wrote a tensor cut it into
pieces. A checkpoint has two kinds of file:

- `.metadata` lists the pieces. It is a pickle, so an unpickler reads it that knows only the classes of such a list.
- `*.distcp` hold the pieces, many in one file, each in the format of `torch.save`. `torch.load` would copy a piece to
  fresh memory. `Piece.read` maps the file instead: the numbers stay where the kernel read them, and numbers that nobody
  asks for are not read.
"""

import io
import itertools
import math
import pickle
import struct
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import EnumType
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import METADATA, check_megatron_checkpoint
from megatron_solopo.checkpoint.huggingface_weights import DTYPES, all_finite, check_tensor_names
from megatron_solopo.checkpoint.mapping import Place, ReadRows, Rule, megatron_shape, place, rules
from megatron_solopo.errors import UserError

THREADS = 2
"""Threads of a conversion: while one waits for the disk or the kernel, the other computes."""
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
# What a damaged pickle of tensors raises. Python's documentation of pickle names some, and says that there are others.
_DAMAGED_PICKLE = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
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
    """Read the list of pieces; raises UserError, naming the file, if it is damaged or holds other things."""
    file = checkpoint / METADATA
    content = io.BytesIO(file.read_bytes())
    try:
        metadata = _Unpickler(content, file).load()
    except UserError:
        raise
    except _DAMAGED_PICKLE as error:
        raise UserError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise UserError(f"{file}: is no list of stored tensors")
    return metadata


class _Unpickler(pickle._Unpickler):
    """Makes instances of `_SAFE_CLASSES` only. It is Python's own unpickler, in which each step can be replaced."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO, file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name == "getattr":
            return self._enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _SAFE_CLASSES.get(module, ()):
            raise UserError(f"{self._file}: names {module}.{name}, which has no place in a checkpoint; it was not run")
        return super().find_class(module, name)

    def _enum_member(self, enumeration: Any, name: Any) -> Any:
        """Stand in for `getattr`, by which Python 3.11.0 to 3.11.3 name the members of an enumeration (gh-105332)."""
        if isinstance(enumeration, EnumType) and name in enumeration.__members__:
            return enumeration.__members__[name]
        raise UserError(f"{self._file}: asks for {name!r} of {enumeration!r}, which has no place in a checkpoint")

    def load_build(self) -> None:
        """Set the attributes of an instance, but never those of a class or a function, which all code shares."""
        target = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(target, type) or callable(target):
            raise UserError(
                f"{self._file}: would change {target!r}, which has no place in a checkpoint; it was not done"
            )
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


@dataclass(frozen=True)
class Piece:
    """A stored piece of a tensor: the bytes [start, start + length) of a file, in the format of `torch.save`."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    length: int

    def read(self) -> Tensor:
        """Map the numbers, with `shape` and `dtype`. The tensor keeps the file open while it lives.

        Raises UserError, naming the file, if something else is stored there. If somebody cuts the file short while it
        is mapped, the process ends (SIGBUS), as it does with safetensors.
        """
        with self.file.open("rb") as stream:
            like, start = self._find_numbers(stream)
            nbytes = like.untyped_storage().nbytes()
            first = start // ALLOCATIONGRANULARITY * ALLOCATIONGRANULARITY
            pages = mmap(stream.fileno(), start + nbytes - first, access=ACCESS_COPY, offset=first)
        count = nbytes // self.dtype.itemsize
        numbers = torch.frombuffer(pages, dtype=self.dtype, count=count, offset=start - first)
        return numbers.as_strided(like.shape, like.stride(), like.storage_offset())

    def _find_numbers(self, stream: IO[bytes]) -> tuple[Tensor, int]:
        """Return the stored tensor on the meta device, and the byte of the file where its numbers begin."""
        view = cast(IO[bytes], _create_file_view(cast(io.IOBase, stream), self.start, self.length))
        try:
            like = torch.load(view, map_location="meta", weights_only=True)
            view.seek(0)
            reader: Any = torch._C.PyTorchFileReader(view)
            start = self.start + reader.get_record_offset("data/0")
        except _DAMAGED_PICKLE as error:
            raise self._damaged(" ".join(str(error).split())[:200] or type(error).__name__) from error
        if not isinstance(like, Tensor):
            raise self._damaged(f"holds {type(like).__name__} instead of a tensor")
        if (tuple(like.shape), like.dtype) != (self.shape, self.dtype):
            raise self._damaged(
                f"holds {like.dtype} of shape {tuple(like.shape)} instead of {self.dtype} of {self.shape}"
            )
        nbytes = like.untyped_storage().nbytes()
        last = like.storage_offset() + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
        if start + nbytes > self.start + self.length or (last + 1) * self.dtype.itemsize > nbytes:
            raise self._damaged("it ends before its last number")
        return like, start

    def _damaged(self, problem: str) -> UserError:
        return UserError(f"{self.file}: {self.key} cannot be read: {problem}; the checkpoint is damaged")


class MegatronDirectory:
    """The model's tensors in a Megatron checkpoint. Everything else there, as the optimizer's state, is ignored."""

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
        self._at: dict[str, dict[tuple[int, ...], TensorStorageMetadata]] = {}
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
            raise UserError(f"{self.path / METADATA}: names no file for {key} {chunk.offsets}")
        if Path(info.relative_path).name != info.relative_path:
            raise UserError(
                f"{self.path / METADATA}: names {info.relative_path} as the file of {key}, "
                "which is outside the checkpoint"
            )
        if getattr(info, "transform_descriptors", None):
            raise UserError(
                f"{self.path / METADATA}: {key} is stored with transforms {', '.join(info.transform_descriptors)}; "
                "supported: none"
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
                raise UserError(f"{piece.file}: {problem} and should hold {piece.key}; the checkpoint is damaged")

    def file_with_bad_numbers(self, place: Place) -> Path:
        """The first file with a piece of a parameter that is not finite. Reads all of its pieces."""
        for piece in self.pieces():
            axes = zip(place.position, piece.offsets, piece.shape, strict=False)
            holds_some = all(first <= number < first + count for number, first, count in axes)
            if piece.key == place.key and holds_some and not all_finite(piece.read()):
                return piece.file
        return self.path

    def check(self, architecture: Architecture) -> None:
        """Compare the stored tensors with those that the config asks for. The vocabulary may be padded.

        Raises UserError naming missing, unexpected or misshapen tensors, or a precision that is not supported.
        """
        expected = {}
        for rule in rules(architecture).values():
            where = place(rule, architecture)
            if where.key not in expected:
                expected[where.key] = (*where.stack, *self._expected_shape(rule, architecture, where.key))
        check_tensor_names(self.path, self.tensors, expected, architecture)
        for key, shape in expected.items():
            found, dtype = tuple(self.tensors[key].size), self.tensors[key].properties.dtype
            if found != shape:
                raise UserError(f"{self.path}: {key} has shape {found}, but config.json asks for {shape}")
            if dtype not in DTYPES.values():
                raise UserError(f"{self.path}: {key} is stored as {dtype}; supported: {', '.join(DTYPES)}")

    def _expected_shape(self, rule: Rule, architecture: Architecture, key: str) -> tuple[int, ...]:
        shape = megatron_shape(rule, architecture)
        stored = self.tensors.get(key)
        padded = rule.fusion == "vocab" and stored is not None and stored.size[0] > shape[0]
        return (stored.size[0], *shape[1:]) if padded and stored is not None else shape

    def dtype(self, place: Place) -> torch.dtype:
        """The precision that a parameter is stored in."""
        found: torch.dtype = self.tensors[place.key].properties.dtype
        return found

    def rows_of(self, place: Place) -> ReadRows:
        """Return a function that reads rows of one parameter in their stored precision."""
        stacked = len(place.position)
        others = list(self.tensors[place.key].size)[stacked + 1 :]
        entry = self._entry_at(place)

        def read(start: int, end: int) -> Tensor:
            offsets, sizes = [*place.position, start, *[0] * len(others)], [end - start, *others]
            return self._read(place.key, entry, offsets, [*[1] * stacked, *sizes]).view(sizes)

        return read

    def _entry_at(self, place: Place) -> TensorStorageMetadata:
        """The tensor's entry, with the pieces alone that hold some of this parameter.

        A tensor that stacks the experts of all layers has tens of thousands of pieces. torch looks at each for each
        read, so it gets few.
        """
        if place.key not in self._at:
            entry, stacked = self.tensors[place.key], len(place.position)
            chunks: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in entry.chunks:
                axes = zip(chunk.offsets[:stacked], chunk.sizes[:stacked], strict=True)
                for position in itertools.product(*(range(first, first + count) for first, count in axes)):
                    chunks.setdefault(position, []).append(chunk)
            self._at[place.key] = {position: replace(entry, chunks=found) for position, found in chunks.items()}
        none = replace(self.tensors[place.key], chunks=[])
        return self._at[place.key].get(place.position, none)

    def _read(self, key: str, entry: TensorStorageMetadata, offsets: list[int], sizes: list[int]) -> Tensor:
        """Read a box of a tensor. This takes memory only if the box consists of several pieces."""
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
