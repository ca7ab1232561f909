"""Reads parameters of a Megatron distributed checkpoint, without building its model and without running code of it.

Megatron stores the layers of a model stacked in one tensor, [layers, ...], cut into pieces as the
ranks that wrote it held them.
"""

import math
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_solopo.architecture.huggingface import Architecture
from megatron_solopo.checkpoint.huggingface import DTYPES, check_names
from megatron_solopo.checkpoint.mapping import ReadRows, Rule, megatron_shape, rules
from megatron_solopo.checkpoint.megatron_metadata import read_metadata
from megatron_solopo.checkpoint.megatron_piece import Piece
from megatron_solopo.model_directory import METADATA, check_megatron_checkpoint

THREADS = 2
"""Convert side by side: while one waits for the disk or for the kernel, the other computes."""
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


class MegatronDirectory:
    """The model's tensors in a Megatron checkpoint; the optimizer's state and everything else is passed over."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if `path` is no checkpoint, or if its list of pieces or one of its files is damaged."""
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
            raise ValueError(f"{self.path / METADATA}: says of no file that it holds {key} {chunk.offsets}")
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(
                f"{self.path / METADATA}: says that {key} lies in {info.relative_path}, outside the checkpoint"
            )
        if getattr(info, "transform_descriptors", None):
            raise ValueError(
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
            raise ValueError(f"{self.path}: {key} is not stored whole; the checkpoint is damaged")
        parts = [_part(self._pieces[item.storage_index].read(), item.storage_offsets, item.lengths) for item in items]
        if len(parts) == 1:
            return parts[0]
        joined = torch.empty(sizes, dtype=entry.properties.dtype)
        for item, part in zip(items, parts, strict=True):
            _part(joined, item.dest_offsets, item.lengths).copy_(part)
        return joined


def _part(tensor: Tensor, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    return tensor[tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))]
