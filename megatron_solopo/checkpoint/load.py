"""Fills this rank's model chunks and optimizer from a checkpoint of any layout, or from a Hugging Face directory."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import is_megatron_checkpoint
from megatron_solopo.checkpoint.huggingface_weights import SafetensorsDirectory, all_finite, not_finite
from megatron_solopo.checkpoint.mapping import EMBEDDING, OUTPUT, canonical_name, rules, to_megatron
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory
from megatron_solopo.checkpoint.sharded_state import (
    KERNEL_STATE,
    keyed,
    load_optimizer,
    model_state,
    parameter_state,
)
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.parallel.agreement import on_every_rank
from megatron_solopo.parallel.megatron_internals import assign, initialize_adam_state


def load_checkpoint(path: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None) -> None:
    """Load parameters, and the optimizer's state if one is given, under the current layout.

    Raises UserError on every rank if a parameter is not finite.
    """
    if optimizer is not None:
        initialize_adam_state(optimizer)
    _load_model(path, chunks)
    if optimizer is not None:
        load_optimizer(path, optimizer, model_state(chunks))


def _load_model(path: Path, chunks: Sequence[DistributedDataParallel]) -> None:
    """A function of its own, so that the loaded copy is freed before the optimizer's state is read."""
    state = dist_checkpointing.load(model_state(chunks), str(path))
    for key, chunk in keyed(chunks).items():
        named = ((name, value) for name, value in state[key].items() if isinstance(value, Tensor))
        on_every_rank(partial(_check_finite, path, named))
        missing, unexpected = chunk.module.load_state_dict(state[key], strict=False)
        assert not unexpected and all(name.endswith(KERNEL_STATE) for name in missing), (missing, unexpected)


def check_weights(path: Path, architecture: Architecture) -> None:
    """Check the list of stored tensors. It reads headers, and both tensors of a tied pair that is stored twice.

    Raises UserError naming tensors that are missing, unexpected or misshapen. Numbers are checked when they are loaded.
    """
    (MegatronDirectory if is_megatron_checkpoint(path) else SafetensorsDirectory)(path).check(architecture)


def load_weights(chunks: Sequence[ResponseModel], architecture: Architecture, path: Path) -> None:
    """Fill every parameter of this rank from the model in `path`, cast to the model's precision.

    Args:
        path: a Hugging Face directory, or a checkpoint of `convert import` or of a run under any layout.

    All ranks must call it together. Each rank checks the numbers that it reads.

    Raises UserError on every rank, naming missing, unexpected or misshapen tensors before any parameter is touched,
    or a tensor that is not finite, with its file.
    """
    on_every_rank(lambda: check_weights(path, architecture))
    if is_megatron_checkpoint(path):
        loaded = dist_checkpointing.load(parameter_state(chunks), str(path))
        on_every_rank(lambda: _assign_stored(path, chunks, architecture, loaded))
    else:
        on_every_rank(lambda: _assign_huggingface(path, chunks, architecture))


def _assign_stored(
    path: Path, chunks: Sequence[ResponseModel], architecture: Architecture, loaded: dict[str, dict[str, Tensor]]
) -> None:
    table = rules(architecture)
    for key, chunk in keyed(chunks).items():
        for (name, parameter), (global_name, _) in zip(chunk.named_parameters(), global_parameters(chunk), strict=True):
            if not all_finite(loaded[key][name]):
                raise not_finite(MegatronDirectory(path).file_with_bad_numbers(table[global_name]), global_name)
            assign(parameter, loaded[key][name])


def _assign_huggingface(path: Path, chunks: Sequence[ResponseModel], architecture: Architecture) -> None:
    source, table = SafetensorsDirectory(path), rules(architecture)
    for chunk in chunks:
        group = chunk.pg_collection.tp
        share = {"rank": group.rank(), "size": group.size(), "padded_vocab": chunk.vocab_size}
        for name, parameter in global_parameters(chunk):
            assign(parameter, to_megatron(table[name], architecture, source.read_finite, **share))


def _check_finite(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, value in tensors:
        if not all_finite(value):
            raise not_finite(path, name)


def global_parameters(chunk: ResponseModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this chunk's parameters by their names in the mapping table, with layers counted over the whole model.

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
