"""Writes safetensors files tensor by tensor: the safetensors library itself wants a whole file's tensors in memory.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of the header, the
header in JSON with every tensor's precision, shape and place, then the tensors' bytes.
"""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from megatron_solopo.checkpoint.huggingface import DTYPES, INDEX
from megatron_solopo.checkpoint.manifest import sync_file
from megatron_solopo.files import write_json

_HEADER_MULTIPLE = 8
_FLUSH_BYTES = 1 << 28
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    file: Path
    start: int
    like: Tensor
    """On the meta device: shape and precision."""


class SafetensorsWriter:
    """Files of a model in a directory; tensors, and parts of them, may come in any order and from several threads."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
        """Write headers and, for several files, the index.

        Args:
            path: an existing directory.
            tensors: on the meta device, every one that will be written.
            max_shard_bytes: most bytes of tensors in one file, unless one tensor alone is larger.
        """
        split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_bytes)
        self._places: dict[str, _Place] = {}
        self._files = [path / file for file in split.filename_to_tensors]
        for file, names in split.filename_to_tensors.items():
            self._write_header(path / file, {name: tensors[name] for name in names})
        if split.is_sharded:
            write_json(
                path / INDEX, {"metadata": split.metadata, "weight_map": dict(sorted(self._weight_map().items()))}
            )
        self._missing = {name: tensor.numel() for name, tensor in tensors.items()}
        self._lock = Lock()
        # Brings to the disk what is written while the next tensors are read.
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []
        self._unflushed_bytes = 0

    def _weight_map(self) -> dict[str, str]:
        return {name: place.file.name for name, place in self._places.items()}

    def _write_header(self, file: Path, tensors: dict[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts: dict[str, int] = {}
        end = 0
        # The wider precision first, so that every tensor starts at a multiple of its own width.
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
            starts[name], end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_MULTIPLE)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
        self._places |= {name: _Place(file, 8 + len(text) + start, tensors[name]) for name, start in starts.items()}

    def write(self, name: str, tensor: Tensor, first_row: int = 0) -> None:
        """Write one tensor of the announced shape and precision, or rows of it; every row once."""
        place = self._places[name]
        assert (tensor.shape[1:], tensor.dtype) == (place.like.shape[1:], place.like.dtype), name
        row_bytes = place.like[:1].nbytes
        with place.file.open("r+b", buffering=0) as stream:
            stream.seek(place.start + first_row * row_bytes)
            content = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            while content:
                content = content[stream.write(content) :]
        with self._lock:
            self._missing[name] -= tensor.numel()
            self._unflushed_bytes += tensor.nbytes
            if self._unflushed_bytes >= _FLUSH_BYTES:
                self._flushes.append(self._flusher.submit(sync_file, place.file))
                self._unflushed_bytes = 0

    def finish(self) -> None:
        """Make sure that all is written, and on the disk."""
        missing = {name: count for name, count in self._missing.items() if count}
        assert not missing, missing
        self._flushes += [self._flusher.submit(sync_file, file) for file in self._files]
        for flush in self._flushes:
            flush.result()
        self._flusher.shutdown()
