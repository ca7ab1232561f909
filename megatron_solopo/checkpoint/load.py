"""Fills this rank's model chunks and optimizer from a checkpoint of any layout, or from a Hugging Face directory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import is_megatron_checkpoint
from megatron_solopo.checkpoint.huggingface_weights import SafetensorsDirectory
from megatron_solopo.checkpoint.mapping import EMBEDDING, OUTPUT, canonical_name, rules, to_megatron
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory
from megatron_solopo.checkpoint.sharded_state import (
    KERNEL_STATE,
    keyed,
    load_optimizer_state,
    model_state,
    optimizer_state_to_load,
    parameter_state,
)
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.parallel.megatron_internals import assign, initialize_adam_state


def load_checkpoint(path: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None) -> None:
    """Load parameters, and the optimizer's state if one is given, under the current layout."""
    if optimizer is not None:
        initialize_adam_state(optimizer)
    _load_model(path, chunks)
    if optimizer is not None:
        wanted = {"optimizer": optimizer_state_to_load(optimizer, model_state(chunks))}
        # Megatron's check expects a request for the first replica of every tensor, but the rank that holds this replica
        # may own nothing of the parameter.
        state = dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
        load_optimizer_state(optimizer, state["optimizer"])


def _load_model(path: Path, chunks: Sequence[DistributedDataParallel]) -> None:
    """A function of its own, so that the loaded copy is freed before the optimizer's state is read."""
    state = dist_checkpointing.load(model_state(chunks), str(path))
    for key, chunk in keyed(chunks).items():
        missing, unexpected = chunk.module.load_state_dict(state[key], strict=False)
        assert not unexpected and all(name.endswith(KERNEL_STATE) for name in missing), (missing, unexpected)


def load_weights(chunks: Sequence[ResponseModel], architecture: Architecture, path: Path) -> None:
    """Fill every parameter of this rank from the model in `path`, cast to the model's precision.

    Args:
        path: a Hugging Face directory, or a checkpoint of `convert import` or of a run under any layout.

    Raises UserError naming missing, unexpected or misshapen tensors, before any parameter is touched.
    """
    if is_megatron_checkpoint(path):
        MegatronDirectory(path).check(architecture)
        loaded = dist_checkpointing.load(parameter_state(chunks), str(path))
        for key, chunk in keyed(chunks).items():
            for name, parameter in chunk.named_parameters():
                assign(parameter, loaded[key][name])
        return
    source = SafetensorsDirectory(path)
    source.check(architecture)
    table = rules(architecture)
    for chunk in chunks:
        group = chunk.pg_collection.tp
        share = {"rank": group.rank(), "size": group.size(), "padded_vocab": chunk.vocab_size}
        for name, parameter in global_parameters(chunk):
            assign(parameter, to_megatron(table[name], architecture, source.read, **share))


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
