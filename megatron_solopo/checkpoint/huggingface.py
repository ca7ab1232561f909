"""Loads a Hugging Face directory of safetensors into this rank's model chunks."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_solopo.architecture.huggingface import Architecture
from megatron_solopo.checkpoint.mapping import EMBEDDING, OUTPUT, canonical_name, rules, to_huggingface, to_megatron
from megatron_solopo.files import sha256_file, sha256_json
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.precision import assign

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SAMPLE_BYTES = 4096
# Old checkpoints store these although they follow from the config.
_DERIVED = ("rotary_emb.inv_freq",)


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory, read one at a time."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if there are no safetensors weights, or if the index or a shard is missing or damaged."""
        self.path = path
        self.files = self._locate()

    def _locate(self) -> dict[str, str]:
        if (self.path / _INDEX).is_file():
            return self._checked_index()
        if not (self.path / _SINGLE).is_file():
            raise ValueError(f"{self.path}: holds neither {_SINGLE} nor {_INDEX}; model weights must be safetensors")
        return dict.fromkeys(self._names_in(_SINGLE), _SINGLE)

    def _checked_index(self) -> dict[str, str]:
        """The index's shard of every tensor; all are opened here, so that a bad one is found before loading starts."""
        file = self.path / _INDEX
        try:
            weight_map = json.loads(file.read_bytes())["weight_map"]
            index = {name: str(shard) for name, shard in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: not an index of safetensors shards: {type(error).__name__}: {error}; "
                'expected a JSON object whose "weight_map" maps tensors to files'
            ) from None
        held = {shard: self._names_in(shard) for shard in set(index.values())}
        for name, shard in index.items():
            if name not in held[shard]:
                raise ValueError(f"{file}: says that {shard} holds {name}, which it does not")
        return index

    def _names_in(self, file: str) -> set[str]:
        with self._open(file) as shard:
            return set(shard.keys())

    def _open(self, file: str) -> safe_open:
        try:
            return safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path / file}: cannot be read: {error}") from None

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the precision it is stored in."""
        with self._open(self.files[name]) as shard:
            return shard.get_tensor(name)


def load_weights(chunks: Sequence[ResponseModel], architecture: Architecture, path: Path) -> None:
    """Fill every parameter of this rank from the Hugging Face directory `path`, cast to the model's precision.

    Raises ValueError naming missing, unexpected or misshapen tensors, before any parameter is touched
    in the first two cases.
    """
    source = SafetensorsDirectory(path)
    table = rules(architecture)
    _check_names(source, {name for rule in table.values() for name in rule.huggingface}, architecture)
    for chunk in chunks:
        group = chunk.pg_collection.tp
        padded_vocab = chunk.vocab_size
        for name, parameter in global_parameters(chunk):
            rule = table[name]
            tensors = [source.read(each) for each in rule.huggingface]
            # Checked before fusing, which could make the right shape of wrong ones.
            expected = to_huggingface(rule, architecture, [parameter.detach().to("meta")] * group.size())
            for each, tensor, wanted in zip(rule.huggingface, tensors, expected, strict=True):
                if tensor.shape != wanted.shape:
                    raise ValueError(
                        f"{path}: {each} has shape {tuple(tensor.shape)}, "
                        f"but config.json asks for {tuple(wanted.shape)}"
                    )
            share = to_megatron(
                rule, architecture, tensors, rank=group.rank(), size=group.size(), padded_vocab=padded_vocab
            )
            assign(parameter, share)


def global_parameters(chunk: ResponseModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This chunk's parameters by their name in the mapping table, layers counted over the whole model.

    With tied embeddings, the last pipeline stage's own copy appears under the embedding's name.
    """
    for name, parameter in chunk.named_parameters():
        if name.startswith("decoder.layers."):
            local, rest = name.removeprefix("decoder.layers.").split(".", 1)
            layer = chunk.decoder.layers[int(local)].layer_number - 1
            name = f"decoder.layers.{layer}.{rest}"
        if name == OUTPUT and chunk.share_embeddings_and_output_weights:
            name = EMBEDDING
        yield canonical_name(name), parameter


def weights_fingerprint(path: Path) -> str:
    """Identifies the model in a Hugging Face directory: its config, and a sample of every tensor.

    4 KiB from the middle of each tensor tell two models apart in a moment, however large: training
    or merging changes a tensor everywhere. An edit of a few single numbers can go unnoticed.
    """
    files = sorted(set(SafetensorsDirectory(path).files.values()))
    samples = {file: _sample_tensors(path / file) for file in files}
    return sha256_json({"config": sha256_file(path / "config.json"), "weights": samples})


def _sample_tensors(file: Path) -> str:
    """Hex SHA-256 of a safetensors file's header and of the middle of each of its tensors."""
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        digest = hashlib.sha256(header)
        start_of_data = stream.tell()
        for name, entry in sorted(json.loads(header).items()):
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                stream.seek(start_of_data + max(start, (start + end - _SAMPLE_BYTES) // 2))
                digest.update(stream.read(min(_SAMPLE_BYTES, end - start)))
    return digest.hexdigest()


def _check_names(source: SafetensorsDirectory, expected: set[str], architecture: Architecture) -> None:
    found = {name for name in source.files if not name.endswith(_DERIVED)}
    if architecture.tied_embeddings:
        found.discard("lm_head.weight")
    for problem, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise ValueError(
                f"{source.path}: {len(names)} {problem} tensors for a {architecture.model_type} model "
                f"with {architecture.num_layers} layers: {shown}{', ...' if len(names) > 5 else ''}"
            )
