"""The weights of a Hugging Face directory: safetensors, checked against its config and read piece by piece."""

import json
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_solopo.architecture.huggingface import Architecture
from megatron_solopo.checkpoint.mapping import (
    HF_EMBEDDING,
    HF_OUTPUT,
    Index,
    huggingface_shapes,
    rules,
)
from megatron_solopo.files import counted

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The precisions that weights are stored in, by their names in safetensors."""
_PIECE_BYTES = 1 << 26
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 5
_CONVERT_PICKLED = (
    "pytorch_model.bin is not read; in transformers, load it and save_pretrained(..., safe_serialization=True)"
)
# Old checkpoints store these although they follow from the config.
_DERIVED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored, and as what."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: BF16, F32, ..."""


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory, read one at a time."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if there are no safetensors weights, or if the index or a shard is missing or damaged."""
        self.path = path
        self.entries = self._locate()

    def _locate(self) -> dict[str, Entry]:
        if (self.path / INDEX).is_file():
            return self._checked_index()
        if not (self.path / SINGLE).is_file():
            pickled = "; " + _CONVERT_PICKLED if any(self.path.glob("pytorch_model*.bin")) else ""
            raise ValueError(
                f"{self.path}: holds neither {SINGLE} nor {INDEX}; model weights must be safetensors{pickled}"
            )
        return self._entries_in(SINGLE)

    def _checked_index(self) -> dict[str, Entry]:
        """What every shard holds; all are opened here, so that a bad one is found before loading starts."""
        file = self.path / INDEX
        try:
            weight_map = json.loads(file.read_bytes())["weight_map"]
            index = {name: str(shard) for name, shard in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: not an index of safetensors shards: {type(error).__name__}: {error}; "
                'expected a JSON object whose "weight_map" maps tensors to files'
            ) from None
        for name, shard in index.items():
            if Path(shard).is_absolute() or ".." in Path(shard).parts:
                raise ValueError(f"{file}: says that {name} lies in {shard}, outside the directory")
        held = {shard: self._entries_in(shard) for shard in sorted(set(index.values()))}
        for name, shard in index.items():
            if name not in held[shard]:
                raise ValueError(f"{file}: says that {shard} holds {name}, which it does not")
        for shard, entries in held.items():
            for name in entries:
                if index.get(name) != shard:
                    raise ValueError(f"{file}: does not say that {shard} holds {name}, which it does")
        return {name: held[shard][name] for name, shard in index.items()}

    def _entries_in(self, file: str) -> dict[str, Entry]:
        with self._open(file) as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118  (no mapping)
            return {name: Entry(file, tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}

    @contextmanager
    def _open(self, file: str) -> Iterator[safe_open]:
        """Raises ValueError where safetensors refuses header or size."""
        try:
            shard = safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path / file}: cannot be read: {error}") from None
        with shard:
            yield shard

    def read(self, name: str, index: Index = (slice(None),)) -> Tensor:
        """A tensor or a part of it, on the CPU, in the precision it is stored in."""
        with self._open(self.entries[name].file) as shard:
            part: Tensor = shard.get_slice(name)[index]
            return part

    def read_finite(self, name: str, index: Index = (slice(None),)) -> Tensor:
        """`read`, but raises ValueError, naming tensor and file, where there is NaN or infinity."""
        part = self.read(name, index)
        if not is_finite(part):
            raise ValueError(
                f"{self.path / self.entries[name].file}: {name} is not finite (NaN or infinity); "
                "the file is damaged or its training diverged: take another copy"
            )
        return part

    def check(self, architecture: Architecture) -> None:
        """Compare with what the config asks for.

        Raises ValueError naming missing, unexpected or misshapen tensors, and those of a precision that is not
        of `DTYPES`; and where tied embeddings are stored twice, with different numbers.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for rule in rules(architecture).values():
            shapes |= huggingface_shapes(rule, architecture)
        found = {name for name in self.entries if not name.endswith(_DERIVED)}
        if architecture.tied_embeddings:
            found.discard(HF_OUTPUT)
        check_names(self.path, found, set(shapes), architecture)
        for name, shape in shapes.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise ValueError(f"{self.path}: {name} has shape {entry.shape}, but config.json asks for {shape}")
            if entry.dtype not in DTYPES:
                raise ValueError(
                    f"{self.path}: {name} is stored as {entry.dtype}; supported: {', '.join(DTYPES)}. "
                    "Quantized weights must be converted first"
                )
        if architecture.tied_embeddings and HF_OUTPUT in self.entries:
            self._check_tied()

    def _check_tied(self) -> None:
        """transformers unties such a pair if the two differ, so this must not pass for a tied model."""
        embedding, output = self.entries[HF_EMBEDDING], self.entries[HF_OUTPUT]
        same = (embedding.shape, embedding.dtype) == (output.shape, output.dtype)
        step = max(1, _PIECE_BYTES // (4 * embedding.shape[1]))
        for start in range(0, embedding.shape[0] if same else 0, step):
            rows = (slice(start, min(start + step, embedding.shape[0])),)
            same = same and bitwise_equal(self.read(HF_EMBEDDING, rows), self.read(HF_OUTPUT, rows))
        if not same:
            raise ValueError(
                f"{self.path}: holds {HF_OUTPUT} beside {HF_EMBEDDING}, and they differ, but config.json ties them; "
                "set tie_word_embeddings to false there, or remove the one that is not meant"
            )


def check_names(path: Path, found: Collection[str], expected: Collection[str], architecture: Architecture) -> None:
    """Raises ValueError, naming the first few, if tensors are missing or unexpected."""
    for problem, names in (("missing", set(expected) - set(found)), ("unexpected", set(found) - set(expected))):
        if names:
            raise ValueError(
                f"{path}: {counted(len(names), f'{problem} tensor')} for a {architecture.model_type} model "
                f"with {counted(architecture.num_layers, 'layer')}: {shown_names(sorted(names))}"
            )


def shown_names(names: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; takes no memory, unlike `isfinite`."""
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


def bitwise_equal(one: Tensor, other: Tensor) -> bool:
    """Whether shape, precision and every bit agree: unlike `torch.equal`, NaN equals itself and -0 is not 0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    ones, others = (each.contiguous().view(-1).view(torch.uint8) for each in (one, other))
    # As integers that are as wide as size and place allow: four times as fast as narrow ones.
    integer = _INTEGERS[math.gcd(len(ones), ones.storage_offset(), others.storage_offset(), max(_INTEGERS))]
    return torch.equal(ones.view(integer), others.view(integer))
