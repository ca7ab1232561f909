"""Megatron distributed checkpoints that load under any parallel layout, complete or absent.

checkpoints/iter_0000010/   Megatron's files (model, optimizer), trainer.json and huggingface/ (config, tokenizer)
checkpoints/latest          the name of the newest complete one, written last
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_solopo.checkpoint.model_files import write_model_files
from megatron_solopo.checkpoint.optimizer_state import initialize_state, load_state, portable
from megatron_solopo.files import atomic_path, remove, replace, write_json
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.precision import assign
from megatron_solopo.model_directory import HUGGINGFACE_FOLDER, MEGATRON_LM_VERSION

_LATEST = "latest"
_TRAINER_STATE = "trainer.json"
_KERNEL_STATE = "_extra_state"
_Chunk = TypeVar("_Chunk", DistributedDataParallel, ResponseModel)
# Saved once per parameter, not per rank's share of a buffer: loads under another TP, PP, CP or DP.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def save_checkpoint(
    root: Path,
    step: int,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    trainer_state: dict[str, Any],
    model_files: Mapping[str, bytes],
) -> Path:
    """Write `root/iter_<step>` on all ranks together, then point `latest` to it. Returns its path.

    Args:
        trainer_state: JSON-able, the same on every rank: what is not a tensor.
        model_files: the config, tokenizer and so on that travel with the weights; rank 0's are written.
    """
    final = root / f"iter_{step:07d}"
    temporary = root / f".{final.name}.incomplete"
    if dist.get_rank() == 0:
        remove(temporary)
        temporary.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(chunks, optimizer, is_loading=False) | MEGATRON_LM_VERSION
    dist_checkpointing.save(state, str(temporary), content_metadata=dict(_SHARDING))
    dist.barrier()
    if dist.get_rank() == 0:
        write_model_files(model_files, temporary / HUGGINGFACE_FOLDER)
        write_json(temporary / _TRAINER_STATE, trainer_state | {"step": step})
        replace(temporary, final)
        with atomic_path(root / _LATEST) as pointer:
            pointer.write_text(final.name + "\n", encoding="utf-8")
    dist.barrier()
    return final


def latest_checkpoint(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `latest` names and its trainer state plus `step`, or None where nothing was saved yet.

    Rank 0 looks and tells the others: on a shared file system they might not see the same yet.

    Raises ValueError, on every rank, if it names a directory that is not a complete checkpoint.
    """
    found: list[Any] = [_read_latest(root) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise ValueError(found[0])
    checkpoint: tuple[Path, dict[str, Any]] | None = found[0]
    return checkpoint


def _read_latest(root: Path) -> tuple[Path, dict[str, Any]] | str | None:
    """Path and state, or what is wrong."""
    pointer = root / _LATEST
    if not pointer.is_file():
        return None
    path = root / pointer.read_text(encoding="utf-8").strip()
    try:
        return path, json.loads((path / _TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (
            f"{pointer}: names {path}, which is not a complete checkpoint; write the name of a complete one into it, "
            "or remove it to start anew"
        )


def load_checkpoint(path: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None) -> None:
    """Load parameters, and the optimizer's state if one is given, under the current layout."""
    if optimizer is not None:
        initialize_state(optimizer)
    state = dist_checkpointing.load(_sharded_state(chunks, optimizer, is_loading=True), str(path))
    for key, chunk in _keyed(chunks).items():
        missing, unexpected = chunk.module.load_state_dict(state[key], strict=False)
        assert not unexpected and all(name.endswith(_KERNEL_STATE) for name in missing), (missing, unexpected)
    if optimizer is not None:
        load_state(optimizer, state["optimizer"])


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


def _sharded_state(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    metadata = _metadata()
    model = {key: _sharded_model(chunk.module, metadata) for key, chunk in _keyed(chunks).items()}
    if optimizer is None:
        return model
    parameters = model["model"] if len(chunks) == 1 else model
    return model | {
        "optimizer": portable(optimizer.sharded_state_dict(dict(parameters), is_loading=is_loading, metadata=metadata))
    }


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
