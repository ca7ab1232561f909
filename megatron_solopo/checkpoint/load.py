"""Megatron distributed checkpoints that load under any parallel layout, complete or absent.

checkpoints/iter_0000010/   Megatron's files (model, optimizer), trainer.json, huggingface/ (config, tokenizer) and
                            manifest.json, which lists all of them

Fills this rank's model chunks from a Hugging Face directory or from a Megatron checkpoint.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import MEGATRON_LM_VERSION, is_megatron_checkpoint
from megatron_solopo.checkpoint.huggingface_weights import SafetensorsDirectory
from megatron_solopo.checkpoint.mapping import EMBEDDING, OUTPUT, canonical_name, rules, to_megatron
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory
from megatron_solopo.checkpoint.optimizer_state import load_state, state_to_load, state_to_save
from megatron_solopo.checkpoint.save import CheckpointContent, PendingSave
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.parallel.megatron_internals import assign, initialize_adam_state

_KERNEL_STATE = "_extra_state"
_Chunk = TypeVar("_Chunk", DistributedDataParallel, ResponseModel)
# Saved once per parameter, not per rank's share of a buffer: loads under another TP, PP, CP or DP. Gathered for that in
# host memory, by the first data-parallel rank alone, which writes it. Otherwise every rank would hold the whole of it,
# and take 4 bytes per parameter on its GPU meanwhile.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


def begin_save(
    root: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    content: CheckpointContent,
    *,
    background: bool = False,
) -> PendingSave:
    """Begin to write `root/iter_<step>` on all ranks together; `complete` of what is returned makes it a checkpoint.

    Args:
        background: threads write copies of the state while training goes on.

    Raises UserError on every rank, and leaves nothing behind, where one of them finds no room or cannot write.
    """
    model, metadata = _sharded_model_state(chunks), _metadata()
    state = model | {"optimizer": state_to_save(optimizer, _parameters(model), metadata)} | MEGATRON_LM_VERSION
    return PendingSave(root, state, dict(_SHARDING), content, background=background)


def load_checkpoint(path: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None) -> None:
    """Load parameters, and the optimizer's state if one is given, under the current layout."""
    if optimizer is not None:
        initialize_adam_state(optimizer)
    _load_model(path, chunks)
    if optimizer is not None:
        wanted = {"optimizer": state_to_load(optimizer, _parameters(_sharded_model_state(chunks)), _metadata())}
        # Megatron's check wants every tensor's first replica asked for, whose rank may own nothing of the parameter.
        state = dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
        load_state(optimizer, state["optimizer"])


def _load_model(path: Path, chunks: Sequence[DistributedDataParallel]) -> None:
    """Apart, so that what was loaded is gone before the optimizer's state comes."""
    state = dist_checkpointing.load(_sharded_model_state(chunks), str(path))
    for key, chunk in _keyed(chunks).items():
        missing, unexpected = chunk.module.load_state_dict(state[key], strict=False)
        assert not unexpected and all(name.endswith(_KERNEL_STATE) for name in missing), (missing, unexpected)


def load_parameters(path: Path, chunks: Sequence[ResponseModel]) -> None:
    """Load the parameters alone, of a checkpoint that `convert import` or any layout wrote, under the current one."""
    metadata = _metadata()
    state = {
        key: _without_kernel_state(chunk.sharded_state_dict(metadata=metadata)) for key, chunk in _keyed(chunks).items()
    }
    loaded = dist_checkpointing.load(state, str(path))
    for key, chunk in _keyed(chunks).items():
        for name, parameter in chunk.named_parameters():
            assign(parameter, loaded[key][name])


def _sharded_model_state(chunks: Sequence[DistributedDataParallel]) -> dict[str, Any]:
    metadata = _metadata()
    return {key: _sharded_model(chunk.module, metadata) for key, chunk in _keyed(chunks).items()}


def _parameters(model: dict[str, Any]) -> dict[str, Any]:
    """The model's sharded state as optimizers want it."""
    return dict(model["model"] if len(model) == 1 else model)


def _metadata() -> dict[str, Any]:
    return _SHARDING | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _sharded_model(module: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """Without the kernels' own state, so that every layer implementation reads the checkpoints of the others."""
    config = module.config
    state: dict[str, Any] = module.sharded_state_dict(metadata=metadata)
    if config.fp8 and config.fp8_recipe == "delayed":
        return state  # its scales are made of earlier steps' values
    return _without_kernel_state(state)


def _without_kernel_state(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.endswith(_KERNEL_STATE)}


def _keyed(chunks: Sequence[_Chunk]) -> dict[str, _Chunk]:
    """Megatron's keys: `model`, or `model0`, `model1`, ... with virtual pipeline stages."""
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{number}": chunk for number, chunk in enumerate(chunks)}


def load_weights(chunks: Sequence[ResponseModel], architecture: Architecture, path: Path) -> None:
    """Fill every parameter of this rank from the model in `path`, cast to the model's precision.

    Raises UserError naming missing, unexpected or misshapen tensors, before any parameter is touched.
    """
    if is_megatron_checkpoint(path):
        MegatronDirectory(path).check(architecture)
        load_parameters(path, chunks)
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
