"""Writes a Megatron distributed checkpoint from Hugging Face weights, piece by piece, without building the model.

The mapping table states what Megatron must know: keys, shapes, and where pieces lie. A plan for torch's own writer of
distributed checkpoints is made from it, and the writer asks for the numbers of one piece at a time. All pieces are
small, and Megatron reads those that its layout needs. The vocabulary is stored without padding, because Megatron pads
it with zeros when it loads under some tensor parallelism.
"""

import io
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import FORMAT, MEGATRON_LM_VERSION
from megatron_solopo.checkpoint.huggingface_weights import DTYPES, SafetensorsDirectory
from megatron_solopo.checkpoint.mapping import Place, Rule, megatron_rows, megatron_shape, place, row_blocks, rules
from megatron_solopo.checkpoint.megatron_reader import THREADS
from megatron_solopo.errors import UserError
from megatron_solopo.files import write_json

_FILE_BYTES = 1 << 30
# The fields of Megatron's CheckpointingConfig that every version knows. Importing the class takes seconds.
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# Transformer Engine keeps state of its kernels beside the weights of every linear layer. With its default strictness,
# Megatron-LM's `--load` asks for that state under every layer specification, so an import stores an empty one. Our own
# loader does not ask for it, so a run's checkpoints hold none (see `sharded_state`).
_EXTRA_STATES = re.compile(r"decoder\..*\.linear_[a-z0-9]+\.weight")


@dataclass(frozen=True)
class _Piece:
    rule: Rule
    rows: slice
    item: WriteItem
    nbytes: int

    @property
    def shape(self) -> torch.Size:
        """The shape in the checkpoint, where the layers are stacked."""
        assert self.item.tensor_data is not None
        return self.item.tensor_data.chunk.sizes


def write_megatron(
    source: SafetensorsDirectory, architecture: Architecture, path: Path, progress: Callable[[int], Any]
) -> None:
    """Write the checkpoint into the directory `path`. `metadata.json`, which makes it complete, comes last.

    Args:
        source: must have passed its check.
        progress: called with the number of bytes of each piece.

    Raises UserError if tensors that Megatron stores as one differ in precision, or if numbers are not finite. Raises
    OSError if writing fails.
    """
    pieces = list(_pieces(source, architecture))
    objects = _extra_states(architecture)
    planner = _LazyPlanner(source, architecture, pieces, objects, progress)
    writer = FileSystemWriter(path, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.set_up_storage_writer(is_coordinator=True)
    groups = [[_bytes_item(key, content) for key, content in objects.items()], *_by_file(pieces)]
    plans = writer.prepare_global_plan([SavePlan(items) for items in groups])
    # While one thread waits for the disk, the other reads and fuses.
    with ThreadPoolExecutor(THREADS, initializer=_leave_out_checksums) as pool:
        results = list(pool.map(lambda plan: writer.write_data(plan, planner).value(), plans))
    writer.finish(_metadata(pieces, objects, architecture), results)
    torch.save({"content_metadata": {}} | MEGATRON_LM_VERSION, path / "common.pt")
    write_json(path / FORMAT, _FORMAT)


def _pieces(source: SafetensorsDirectory, architecture: Architecture) -> Iterator[_Piece]:
    dtypes: dict[str, tuple[str, str]] = {}
    for rule in rules(architecture).values():
        where = place(rule, architecture)
        key = where.key
        for name in rule.huggingface:
            dtype, first = dtypes.setdefault(key, (source.entries[name].dtype, name))
            if source.entries[name].dtype != dtype:
                raise UserError(
                    f"{source.path}: {first} is stored as {dtype}, but {name} as {source.entries[name].dtype}; "
                    "Megatron stores them in one tensor, so store them in one precision"
                )
        yield from _cut(rule, where, architecture, DTYPES[dtypes[key][0]])


def _cut(rule: Rule, where: Place, architecture: Architecture, dtype: torch.dtype) -> Iterator[_Piece]:
    shape = megatron_shape(rule, architecture)
    whole = (*where.stack, *shape)
    for rows in row_blocks(rule, architecture, dtype.itemsize):
        offsets = (*where.position, rows.start, *[0] * (len(shape) - 1))
        sizes = (*[1] * len(where.position), rows.stop - rows.start, *shape[1:])
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(whole))
        index = MetadataIndex(where.key, chunk.offsets)
        item = WriteItem(index, WriteItemType.SHARD, tensor_data=data)
        yield _Piece(rule, rows, item, chunk.sizes.numel() * dtype.itemsize)


def _by_file(pieces: list[_Piece]) -> list[list[WriteItem]]:
    files: list[list[WriteItem]] = [[]]
    size = 0
    for piece in pieces:
        if size and size + piece.nbytes > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(piece.item)
        size += piece.nbytes
    return files


def _extra_states(architecture: Architecture) -> dict[str, bytes]:
    """Empty states of kernels by key, in the form of Megatron's sharded objects."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    places = (
        place(rule, architecture) for rule in rules(architecture).values() if _EXTRA_STATES.fullmatch(rule.megatron)
    )
    return {_extra_state_key(each): buffer.getvalue() for each in places}


def _extra_state_key(weight: Place) -> str:
    """Megatron's key of the state of a linear layer, with its place among the layers and experts that are stacked."""
    position, stack = (".".join(map(str, numbers)) for numbers in (weight.position or (0,), weight.stack or (1,)))
    return f"{weight.key.removesuffix('weight')}_extra_state/shard_{position}_{stack}"


def _bytes_item(key: str, content: bytes) -> WriteItem:
    return WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(len(content)))


def _metadata(pieces: list[_Piece], objects: dict[str, bytes], architecture: Architecture) -> Metadata:
    entries: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    for piece in pieces:
        data = piece.item.tensor_data
        assert data is not None
        entry = entries.setdefault(piece.item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
        entry.chunks.append(data.chunk)
    return Metadata(entries)


def _leave_out_checksums() -> None:
    """Turn off torch's CRC-32 in this thread. It costs more than writing a piece, and torch never reads it."""
    torch.serialization.set_crc32_options(False)


class _LazyPlanner(DefaultSavePlanner):
    """Reads and fuses a piece when torch's writer asks for it."""

    def __init__(
        self,
        source: SafetensorsDirectory,
        architecture: Architecture,
        pieces: list[_Piece],
        objects: dict[str, bytes],
        progress: Callable[[int], Any],
    ) -> None:
        super().__init__()
        self._source, self._architecture, self._progress, self._objects = source, architecture, progress, objects
        self._pieces = {piece.item.index: piece for piece in pieces}

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        piece = self._pieces[write_item.index]
        tensor = megatron_rows(piece.rule, self._architecture, self._source.read_finite, piece.rows)
        self._progress(piece.nbytes)
        # A writer's thread drops each piece before it asks for the next one.
        return tensor.view(piece.shape)
