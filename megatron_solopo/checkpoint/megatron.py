"""Reads single tensors of a Megatron distributed checkpoint, without building its model and without running code of it.

Megatron stores the layers of a model stacked in one tensor, [layers, ...], cut into pieces as the
ranks that wrote it held them. Tensors are read through torch's own distributed checkpointing. Its
list of pieces (`.metadata`) is a pickle; it is read here by an unpickler that knows no class but
those that belong there.
"""

import io
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_solopo.architecture.huggingface import Architecture
from megatron_solopo.checkpoint.huggingface import DTYPES, check_names
from megatron_solopo.checkpoint.mapping import ReadRows, Rule, megatron_shape, rules
from megatron_solopo.model_directory import METADATA, check_megatron_checkpoint

THREADS = 2
"""Convert side by side: while one waits for the disk or for the kernel, the other computes."""
_LARGE_BYTES = 1 << 25
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
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


@dataclass(frozen=True)
class Piece:
    """A stored piece of a tensor: bytes [start, start + length) of a file, torch's own format."""

    key: str
    offsets: tuple[int, ...]
    file: Path
    start: int
    length: int


class MegatronDirectory:
    """The model's tensors in a Megatron checkpoint; the optimizer's state and everything else is passed over."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if `path` is no checkpoint, or if its list of pieces or one of its files is damaged."""
        check_megatron_checkpoint(path, "--checkpoint")
        self.path = path
        self._reader = _Reader(path)
        # While one thread holds a large piece and the parameter that it goes into, the others wait.
        self._large = Lock()
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._storage: dict[MetadataIndex, Any] = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(_MODEL_KEYS)
        }
        self._check_files()

    def pieces(self) -> Iterator[Piece]:
        """Every stored piece of every model tensor."""
        for key, entry in self.tensors.items():
            for number, chunk in enumerate(entry.chunks):
                info = self._storage.get(MetadataIndex(key, chunk.offsets, number))
                if info is None:
                    raise ValueError(f"{self.path / METADATA}: says of no file that it holds {key} {chunk.offsets}")
                if Path(info.relative_path).name != info.relative_path:
                    raise ValueError(
                        f"{self.path / METADATA}: says that {key} lies in {info.relative_path}, outside the checkpoint"
                    )
                yield Piece(key, tuple(chunk.offsets), self.path / info.relative_path, info.offset, info.length)

    def _check_files(self) -> None:
        sizes: dict[Path, int] = {}
        for piece in self.pieces():
            if piece.file not in sizes:
                sizes[piece.file] = piece.file.stat().st_size if piece.file.is_file() else -1
            if sizes[piece.file] < piece.start + piece.length:
                problem = "is missing" if sizes[piece.file] < 0 else f"is cut short at {sizes[piece.file]:,} bytes"
                raise ValueError(f"{piece.file}: {problem}, {piece.key} was stored there; the checkpoint is damaged")

    def check(self, architecture: Architecture) -> None:
        """Compare with what the config asks for; a vocabulary may be padded.

        Raises ValueError naming missing, unexpected or misshapen tensors, or a precision that is not supported.
        """
        expected = {}
        for rule in rules(architecture).values():
            key, layer = rule.stored_at
            expected[key] = self._expected_shape(rule, architecture, layer)
        check_names(self.path, self.tensors, expected, architecture)
        for key, shape in expected.items():
            found, dtype = tuple(self.tensors[key].size), self.tensors[key].properties.dtype
            if found != shape:
                raise ValueError(f"{self.path}: {key} has shape {found}, but config.json asks for {shape}")
            if dtype not in DTYPES.values():
                raise ValueError(f"{self.path}: {key} is stored as {dtype}; supported: {', '.join(DTYPES)}")

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
        """A function that reads rows of one parameter, in the precision they are stored in.

        A stored piece is read as a whole. Where pieces are large, as training writes them, the parameter is read once
        and kept while the function lives.
        """
        key, layer = rule.stored_at
        entry = self.tensors[key]
        rows, *others = list(entry.size)[0 if layer is None else 1 :]

        def read(start: int, end: int) -> Tensor:
            offsets = [start, *[0] * len(others)]
            if layer is None:
                return self._read(key, offsets, [end - start, *others])
            return self._read(key, [layer, *offsets], [1, end - start, *others])[0]

        @cache
        def whole() -> Tensor:
            with self._large:
                return read(0, rows)

        largest = max(chunk.sizes.numel() for chunk in entry.chunks) * entry.properties.dtype.itemsize
        return read if largest <= _LARGE_BYTES else lambda start, end: whole()[start:end]

    def _read(self, key: str, offsets: list[int], sizes: list[int]) -> Tensor:
        """One box of a tensor."""
        entry = self.tensors[key]
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [box])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise ValueError(f"{self.path}: {key} is not stored whole; the checkpoint is damaged")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (RuntimeError, pickle.UnpicklingError, EOFError, AssertionError) as error:
            raise ValueError(
                f"{self.path}: {key} cannot be read: {' '.join(str(error).split())[:200]}; the checkpoint is damaged"
            ) from None
        return target


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


class _Reader(FileSystemReader):
    """torch's reader, with an unpickler that runs no code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / METADATA
        try:
            metadata = _Unpickler(io.BytesIO(file.read_bytes()), file).load()
        except _Refused:
            raise
        # A torn pickle raises whatever its bytes lead to.
        except Exception as error:
            raise ValueError(f"{file}: cannot be read: {type(error).__name__}: {error}") from None
        if not isinstance(metadata, Metadata) or not metadata.storage_data:
            raise ValueError(f"{file}: is no list of stored tensors")
        return metadata


class _Refused(ValueError):
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
