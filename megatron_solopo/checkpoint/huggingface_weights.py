"""The safetensors files of a Hugging Face directory: read piece by piece, and written tensor by tensor.

`SafetensorsDirectory` reads, and checks what is stored against config.json. `SafetensorsWriter` writes, because the
safetensors library needs all tensors of a file in memory at once.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of the header; the header in
JSON with the precision, shape and place of every tensor; then the bytes of the tensors.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import CONFIG, parse_model_json
from megatron_solopo.architecture.one_reading import INDEX, SINGLE, check_one_reading, read_index
from megatron_solopo.checkpoint.manifest import sync_file
from megatron_solopo.checkpoint.mapping import HF_EMBEDDING, HF_OUTPUT, Index, all_huggingface_shapes, expert_names
from megatron_solopo.errors import UserError
from megatron_solopo.files import counted, first_few, write_json

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The supported precisions by their names in safetensors."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COMPARED_BYTES = 1 << 26
_HEADER_MULTIPLE = 8
_FLUSH_BYTES = 1 << 28
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CONVERT_PICKLED = (
    "pytorch_model.bin is not read; in transformers, load it and save_pretrained(..., safe_serialization=True)"
)
# How transformers 5 names the tensors that hold all experts of a layer.
_ALL_EXPERTS = re.compile(r"(.+\.)mlp\.experts\.(gate_up_proj|down_proj)")
DERIVED = ("rotary_emb.inv_freq",)
"""Ends of names. Old checkpoints store these tensors, although they follow from the config."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header describes it."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """Its name in safetensors: BF16, F32 and so on."""
    stored_as: str | None = None
    """Its name in the file; None: the name that we know it by."""
    expert: int | None = None
    """For one of the experts that share a tensor: its number, which is its place on that tensor's first axis."""
    first_row: int = 0
    """Its first row among the expert's rows there."""


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory, read one at a time."""

    def __init__(self, path: Path, entries: dict[str, StoredTensor] | None = None) -> None:
        """Open every file and read its header, if the `entries` are not known.

        Raises UserError if there are no safetensors weights, or if the index or a shard is missing or damaged. Also
        raises it if another loader reads other weights, see `one_reading`.
        """
        self.path = path
        self.entries = self._name_experts(self._locate()) if entries is None else entries

    def _locate(self) -> dict[str, StoredTensor]:
        check_one_reading(self.path)
        index = read_index(self.path)
        if index is not None:
            return self._indexed(index)
        if not (self.path / SINGLE).is_file():
            pickled = "; " + _CONVERT_PICKLED if any(self.path.glob("pytorch_model*.bin")) else ""
            raise UserError(
                f"{self.path}: holds neither {SINGLE} nor {INDEX}; model weights must be safetensors{pickled}"
            )
        return self._entries_in(SINGLE)

    def _indexed(self, index: Mapping[str, str]) -> dict[str, StoredTensor]:
        """The tensors of all shards. Every shard is opened here, so a bad one is found before loading starts."""
        file = self.path / INDEX
        held = {shard: self._entries_in(shard) for shard in sorted(set(index.values()))}
        for name, shard in index.items():
            if name not in held[shard]:
                raise UserError(f"{file}: names {shard} as the file of {name}, but that file does not hold it")
        for shard, entries in held.items():
            for name in entries:
                if index.get(name) != shard:
                    raise UserError(f"{file}: does not name {shard} as the file of {name}, but that file holds it")
        return {name: held[shard][name] for name, shard in index.items()}

    def _entries_in(self, file: str) -> dict[str, StoredTensor]:
        with self._open(file) as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
            return {
                name: StoredTensor(file, tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()
            }

    def _name_experts(self, entries: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Give each expert the names of published checkpoints, where one tensor holds all experts of a layer.

        transformers 5 holds experts so in memory, `gate_up_proj` [experts, gate and up, H] and `down_proj` [experts, H,
        columns], and names Mixtral's router `mlp.gate`.
        """
        if not any(_ALL_EXPERTS.fullmatch(name) for name in entries):
            return entries
        config = parse_model_json((self.path / CONFIG).read_bytes(), self.path / CONFIG)
        block, projections = expert_names(config.get("model_type", "") if isinstance(config, dict) else "")
        named: dict[str, StoredTensor] = {}
        for name, entry in entries.items():
            found = _ALL_EXPERTS.fullmatch(name)
            if found is None or len(entry.shape) != 3:
                named[name.replace(".mlp.gate.", f".{block}.gate.")] = replace(entry, stored_as=name)
                continue
            count, rows, columns = entry.shape
            parts = projections[:2] if found[2] == "gate_up_proj" else projections[2:]
            for expert in range(count):
                for number, projection in enumerate(parts):
                    height = rows // len(parts)
                    named[f"{found[1]}{block}.experts.{expert}.{projection}.weight"] = StoredTensor(
                        entry.file, (height, columns), entry.dtype, name, expert, number * height
                    )
        return named

    @contextmanager
    def _open(self, file: str) -> Iterator[safe_open]:
        """Open a file; raises UserError if safetensors refuses its header or its size."""
        try:
            shard = safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path / file}: cannot be read: {error}") from None
        with shard:
            yield shard

    def read(self, name: str, index: Index = (slice(None),)) -> Tensor:
        """Read a tensor or a part of it on the CPU, in its stored precision."""
        entry = self.entries[name]
        with self._open(entry.file) as shard:
            stored = shard.get_slice(entry.stored_as or name)  # type: ignore[no-untyped-call]
            part: Tensor
            if entry.expert is None:
                part = stored[index]
            else:
                start, stop, _ = index[0].indices(entry.shape[0])
                rows = slice(entry.first_row + start, entry.first_row + stop)
                part = stored[(slice(entry.expert, entry.expert + 1), rows, *index[1:])][0]
            return part

    def read_finite(self, name: str, index: Index = (slice(None),)) -> Tensor:
        """Like `read`, but raises UserError, naming tensor and file, for NaN and infinity."""
        part = self.read(name, index)
        if not all_finite(part):
            raise not_finite(self.path / self.entries[name].file, name)
        return part

    def check(self, architecture: Architecture) -> None:
        """Compare the stored tensors with those that the config asks for.

        Raises UserError naming tensors that are missing, unexpected or misshapen, or whose precision is not in
        `DTYPES`. Also raises it for tied embeddings that are stored twice with different numbers.
        """
        shapes = all_huggingface_shapes(architecture)
        found = {name for name in self.entries if not name.endswith(DERIVED)}
        if architecture.tied_embeddings:
            found.discard(HF_OUTPUT)
        check_tensor_names(self.path, found, set(shapes), architecture)
        for name, shape in shapes.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise UserError(f"{self.path}: {name} has shape {entry.shape}, but config.json asks for {shape}")
            if entry.dtype not in DTYPES:
                raise UserError(
                    f"{self.path}: {name} is stored as {entry.dtype}; supported: {', '.join(DTYPES)}. "
                    "Quantized weights must be converted first"
                )
        if architecture.tied_embeddings and HF_OUTPUT in self.entries:
            self._check_tied()

    def _check_tied(self) -> None:
        """Refuse a tied pair whose tensors differ, because transformers would untie it."""
        embedding, output = self.entries[HF_EMBEDDING], self.entries[HF_OUTPUT]
        same = (embedding.shape, embedding.dtype) == (output.shape, output.dtype)
        step = max(1, _COMPARED_BYTES // (4 * embedding.shape[1]))
        for start in range(0, embedding.shape[0] if same else 0, step):
            rows = (slice(start, min(start + step, embedding.shape[0])),)
            same = same and bitwise_equal(self.read(HF_EMBEDDING, rows), self.read(HF_OUTPUT, rows))
        if not same:
            raise UserError(
                f"{self.path}: holds {HF_OUTPUT} and {HF_EMBEDDING}, which differ, but config.json ties them; "
                "set tie_word_embeddings to false there, or remove one of the two tensors"
            )


def check_tensor_names(
    path: Path, found: Collection[str], expected: Collection[str], architecture: Architecture
) -> None:
    """Raise UserError, naming the first few, if tensors are missing or unexpected."""
    for problem, names in (("missing", set(expected) - set(found)), ("unexpected", set(found) - set(expected))):
        if names:
            raise UserError(
                f"{path}: {counted(len(names), f'{problem} tensor')} for a {architecture.model_type} model "
                f"with {counted(architecture.num_layers, 'layer')}: {first_few(sorted(names))}"
            )


def not_finite(path: Path, name: str) -> UserError:
    """The error for a tensor of the file or directory `path` with numbers that are not finite."""
    return UserError(
        f"{path}: {name} is not finite (NaN or infinity); the file is damaged or its training diverged: "
        "take another copy"
    )


def all_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity. Unlike `isfinite`, this takes no memory."""
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def bitwise_equal(one: Tensor, other: Tensor) -> bool:
    """Whether shape, precision and every bit agree. Unlike in `torch.equal`, NaN equals itself and -0 is not 0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    ones, others = (each.contiguous().view(-1).view(torch.uint8) for each in (one, other))
    # Wide integers compare four times as fast as narrow ones. Size and place limit the width.
    integer = _INTEGERS[math.gcd(len(ones), ones.storage_offset(), others.storage_offset(), max(_INTEGERS))]
    return torch.equal(ones.view(integer), others.view(integer))


@dataclass(frozen=True)
class _Place:
    file: Path
    start: int
    like: Tensor
    """A tensor on the meta device, for its shape and precision."""


class SafetensorsWriter:
    """Writes a model's files. Tensors, and parts of them, may come in any order and from several threads."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
        """Write the headers and, for several files, the index.

        Args:
            path: an existing directory.
            tensors: every tensor that will be written, on the meta device.
            max_shard_bytes: the most bytes of tensors in one file. A larger tensor has a file of its own.
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
        # Flushes written data to the disk while the next tensors are read.
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []
        self._unflushed_bytes = 0

    def _weight_map(self) -> dict[str, str]:
        return {name: place.file.name for name, place in self._places.items()}

    def _write_header(self, file: Path, tensors: dict[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts: dict[str, int] = {}
        end = 0
        # Wide precisions come first, so that every tensor starts at a multiple of its own width.
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
        """Write a tensor, or rows of it, with the announced shape and precision. Every row is written once."""
        place = self._places[name]
        assert (tensor.shape[1:], tensor.dtype) == (place.like.shape[1:], place.like.dtype), name
        row_bytes = place.like[:1].nbytes
        with place.file.open("r+b", buffering=0) as stream:
            stream.seek(place.start + first_row * row_bytes)
            content = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            while content:
                content = content[stream.write(content) :]
        with self._lock:
            self._missing[name] -= tensor.numel()
            self._unflushed_bytes += tensor.nbytes
            if self._unflushed_bytes >= _FLUSH_BYTES:
                self._flushes.append(self._flusher.submit(sync_file, place.file))
                self._unflushed_bytes = 0

    def finish(self) -> None:
        """Wait until everything is on the disk; asserts that every tensor was written."""
        missing = {name: count for name, count in self._missing.items() if count}
        assert not missing, missing
        self._flushes += [self._flusher.submit(sync_file, file) for file in self._files]
        for flush in self._flushes:
            flush.result()
        self._flusher.shutdown()
