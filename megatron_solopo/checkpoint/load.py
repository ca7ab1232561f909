"""Fills this rank's model chunks and optimizer from a checkpoint of any layout, or from a Hugging Face directory."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_solopo.architecture.adapters import ADAPTER
from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import is_megatron_checkpoint
from megatron_solopo.checkpoint.adapter_checkpoint import AdapterCheckpoint, is_adapter_checkpoint
from megatron_solopo.checkpoint.adapters import add_adapters
from megatron_solopo.checkpoint.huggingface_weights import SafetensorsDirectory, StoredTensor, all_finite, not_finite
from megatron_solopo.checkpoint.mapping import EMBEDDING, OUTPUT, canonical_name, place, rules, to_megatron
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory
from megatron_solopo.checkpoint.sharded_state import (
    is_kernel_state,
    keyed,
    load_kernel_state,
    load_optimizer,
    model_state,
    parameter_state,
)
from megatron_solopo.model.adapters import has_adapters
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.parallel.agreement import on_every_rank, on_rank_0
from megatron_solopo.parallel.megatron_internals import (
    assign,
    broadcast_parameter,
    initialize_adam_state,
    is_expert,
    optimizer_parts,
    replica_group,
)


def load_checkpoint(path: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None) -> None:
    """Load parameters, and the optimizer's state if one is given, under the current layout.

    Raises UserError on every rank if a parameter, or a number of the optimizer's state, is not finite.
    """
    if optimizer is not None:
        initialize_adam_state(optimizer)
    _load_model(path, chunks)
    if optimizer is not None:
        load_optimizer(path, optimizer, model_state(chunks))
        on_every_rank(partial(_check_finite, path, _optimizer_tensors(optimizer)))


def _load_model(path: Path, chunks: Sequence[DistributedDataParallel]) -> None:
    """A function of its own, so that the loaded copy is freed before the optimizer's state is read."""
    # Megatron's check of all ranks' requests would send every request to every rank.
    state = dist_checkpointing.load(model_state(chunks), str(path), validate_access_integrity=False)
    for key, chunk in keyed(chunks).items():
        named = ((name, value) for name, value in state[key].items() if isinstance(value, Tensor))
        on_every_rank(partial(_check_finite, path, named))
        load_kernel_state(chunk.module, state[key])
        missing, unexpected = chunk.module.load_state_dict(state[key], strict=False)
        if has_adapters(chunk.module):  # the base is not in the checkpoint
            missing = [name for name in missing if ADAPTER in name]
        assert not unexpected and all(is_kernel_state(name) for name in missing), (missing, unexpected)


def check_weights(path: Path, architecture: Architecture) -> MegatronDirectory | SafetensorsDirectory:
    """Check the list of stored tensors. It reads headers, and both tensors of a tied pair that is stored twice.

    Of several ranks, one should call it: it opens every file.

    Raises UserError naming tensors that are missing, unexpected or misshapen. Numbers are checked when they are loaded.
    """
    if is_adapter_checkpoint(path):
        return check_weights(AdapterCheckpoint(path, architecture).base, architecture)
    directory = MegatronDirectory(path) if is_megatron_checkpoint(path) else SafetensorsDirectory(path)
    directory.check(architecture)
    return directory


def load_weights(chunks: Sequence[ResponseModel], architecture: Architecture, path: Path) -> None:
    """Fill every parameter of this rank from the model in `path`, cast to the model's precision.

    Chunks may have adapters, which stay as they are.

    Args:
        path: a Hugging Face directory, or a checkpoint of `convert import` or of a run under any layout. If it holds
            adapters alone, the base is loaded, and the chunks get the adapters.

    All ranks must call it together. Ranks that hold the same parameters read different ones, check their numbers, and
    send them to each other. So each number is read once for each rank that needs another part of its tensor.

    Raises UserError on every rank, naming missing, unexpected or misshapen tensors before any parameter is touched,
    or a tensor that is not finite, with its file.
    """
    if is_adapter_checkpoint(path):
        adapters = AdapterCheckpoint(path, architecture)
        on_rank_0(adapters.check_base)
        load_weights(chunks, architecture, adapters.base)
        on_every_rank(lambda: add_adapters(chunks, architecture, adapters.lora, adapters.read))
        return
    entries = on_rank_0(lambda: _checked_entries(path, architecture))
    owners = _owners(chunks)
    own = {parameter for parameter, (owner, replicas) in owners.items() if owner == replicas.rank()}
    if is_megatron_checkpoint(path):
        wanted = _state_of(chunks, own)
        # Megatron's check of all ranks' requests would send every request to every rank.
        loaded = dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
        on_every_rank(lambda: _assign_stored(path, chunks, architecture, loaded, own))
    else:
        on_every_rank(lambda: _assign_huggingface(SafetensorsDirectory(path, entries), chunks, architecture, own))
    for parameter, (owner, replicas) in owners.items():
        broadcast_parameter(parameter, owner, replicas)


def _checked_entries(path: Path, architecture: Architecture) -> dict[str, StoredTensor]:
    """Where a Hugging Face directory holds its tensors; nothing for a Megatron checkpoint."""
    directory = check_weights(path, architecture)
    return directory.entries if isinstance(directory, SafetensorsDirectory) else {}


def _owners(chunks: Sequence[ResponseModel]) -> dict[torch.nn.Parameter, tuple[int, dist.ProcessGroup]]:
    """The number of the replica that reads each parameter, and the group of ranks that hold it.

    A replica reads neighbours as far as possible, and each has about as many numbers.
    """
    parameters = [each for chunk in chunks for name, each in chunk.named_parameters() if ADAPTER not in name]
    owners: dict[torch.nn.Parameter, tuple[int, dist.ProcessGroup]] = {}
    for alike in ([each for each in parameters if is_expert(each) is kind] for kind in (False, True)):
        total, before = sum(parameter.numel() for parameter in alike), 0
        for parameter in alike:
            group = replica_group(parameter)
            owners[parameter] = (2 * before + parameter.numel()) * group.size() // (2 * total), group
            before += parameter.numel()
    return {parameter: owners[parameter] for parameter in parameters}


def _state_of(chunks: Sequence[ResponseModel], own: Collection[torch.nn.Parameter]) -> dict[str, dict[str, Any]]:
    """The sharded state of some parameters."""
    names = {
        key: {name for name, each in chunk.named_parameters() if each in own} for key, chunk in keyed(chunks).items()
    }
    return {
        key: {name: value for name, value in state.items() if name in names[key]}
        for key, state in parameter_state(chunks).items()
    }


def _assign_stored(
    path: Path,
    chunks: Sequence[ResponseModel],
    architecture: Architecture,
    loaded: dict[str, dict[str, Tensor]],
    own: Collection[torch.nn.Parameter],
) -> None:
    table = rules(architecture)
    for key, chunk in keyed(chunks).items():
        for (name, parameter), (global_name, _) in zip(chunk.named_parameters(), global_parameters(chunk), strict=True):
            if parameter not in own:
                continue
            if not all_finite(loaded[key][name]):
                where = place(table[global_name], architecture)
                raise not_finite(MegatronDirectory(path).file_with_bad_numbers(where), global_name)
            assign(parameter, loaded[key][name])


def _assign_huggingface(
    source: SafetensorsDirectory,
    chunks: Sequence[ResponseModel],
    architecture: Architecture,
    own: Collection[torch.nn.Parameter],
) -> None:
    table = rules(architecture)
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            if parameter in own:
                group = chunk.pg_collection.expt_tp if table[name].is_expert else chunk.pg_collection.tp
                share = {"rank": group.rank(), "size": group.size(), "padded_vocab": chunk.vocab_size}
                assign(parameter, to_megatron(table[name], architecture, source.read_finite, **share))


def _optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's share of master weights and moments, with a name for messages."""
    for part in optimizer_parts(optimizer):
        for weight in (weight for group in part.optimizer.param_groups for weight in group["params"]):
            yield "the optimizer's master weight", weight.detach()
            for name, value in part.optimizer.state[weight].items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's {name}", value


def _check_finite(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, value in tensors:
        if not all_finite(value):
            raise not_finite(path, name)


def global_parameters(chunk: ResponseModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this chunk's parameters by their names in the mapping table. Layers and experts count over the whole model.

    With tied embeddings, the last pipeline stage's own copy appears under the embedding's name.
    """
    own_experts = (chunk.config.num_moe_experts or 0) // chunk.config.expert_model_parallel_size
    first_expert = own_experts * parallel_state.get_expert_model_parallel_rank()
    for name, parameter in chunk.named_parameters():
        if name.startswith("decoder.layers."):
            local, rest = name.removeprefix("decoder.layers.").split(".", 1)
            layer = chunk.decoder.layers[int(local)].layer_number - 1
            name = f"decoder.layers.{layer}.{rest}"
        if name == OUTPUT and chunk.share_embeddings_and_output_weights:
            name = EMBEDDING
        yield canonical_name(name, first_expert), parameter
