"""Logits of a Hugging Face directory, by transformers, and of a Megatron checkpoint, by our model."""

from pathlib import Path

import psutil
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megatron_solopo.architecture.huggingface import Architecture, read_architecture
from megatron_solopo.checkpoint.huggingface import DTYPES, SafetensorsDirectory
from megatron_solopo.checkpoint.loading import global_parameters, load_weights
from megatron_solopo.checkpoint.mapping import rules
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.parallel import topology

LOGITS_LIMIT = 1e-5
_LENGTHS = (96, 32)
_GIB = 1 << 30


class TransformersError(Exception):
    """transformers cannot load or run a model, for whatever reason; one line."""


def memory_missing(architecture: Architecture) -> str:
    """Why the logits cannot be compared on this machine, or an empty string: the model must fit in fp32, once."""
    needed = int(1.25 * 4 * architecture.num_parameters) + _GIB
    available = psutil.virtual_memory().available
    if needed <= available:
        return ""
    return f"the model in fp32 needs {needed / _GIB:.1f} GiB of memory, {available / _GIB:.1f} GiB are available"


def logits_error(huggingface: Path, checkpoint: Path) -> tuple[float, int]:
    """Greatest relative error |ours - theirs| / |theirs| of a position's logits, in fp32, and the number of positions.

    One model is in memory at a time. Where the Hugging Face weights are of another precision than the
    checkpoint's, the latter are rounded likewise first. Raises TransformersError.
    """
    architecture = read_architecture(checkpoint)
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, architecture.max_sequence_length) for length in _LENGTHS]
    sequences = [torch.randint(architecture.vocab_size, (length,), generator=generator) for length in lengths]
    theirs_TV = _huggingface_logits(huggingface, sequences)
    ours_TV = _our_logits(checkpoint, architecture, SafetensorsDirectory(huggingface), sequences)
    error = (ours_TV - theirs_TV).norm(dim=1) / theirs_TV.norm(dim=1)
    return float(error.nan_to_num(nan=torch.inf).max()), len(error)


@torch.no_grad()
def _huggingface_logits(path: Path, sequences: list[Tensor]) -> Tensor:
    """fp32 [T, V]."""
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        return torch.cat([model(input_ids=tokens.unsqueeze(0)).logits[0] for tokens in sequences])
    # What it raises shares no base class: a package that is missing, a field that its checks let pass, ...
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise TransformersError(f"{path}: transformers cannot run it: {type(error).__name__}: {reason}") from None
    finally:
        if shows_progress:
            logging.enable_progress_bar()


@torch.no_grad()
def _our_logits(
    path: Path, architecture: Architecture, precision: SafetensorsDirectory, sequences: list[Tensor]
) -> Tensor:
    """fp32 [T, V], of the sequences packed into one."""
    groups = topology.initialize(ParallelConfig(), seed=1)
    try:
        config = ModelConfig(path=path, dtype="float32", implementation="local")
        (model,) = build_model(architecture, config, ParallelConfig(), chunk_tokens=1, device=groups.device)
        load_weights([model], architecture, path)
        _round(model, architecture, precision)
        lengths = torch.tensor([0, *(len(tokens) for tokens in sequences)])
        boundaries_S1 = lengths.cumsum(0).to(torch.int32)
        longest = int(lengths.max())
        packing = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries_S1,
            cu_seqlens_kv=boundaries_S1,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        logits_1TV = model(torch.cat(sequences).unsqueeze(0), None, None, packed_seq_params=packing)
        return logits_1TV[0, :, : architecture.vocab_size].clone()
    finally:
        topology.destroy(groups)


def _round(model: ResponseModel, architecture: Architecture, precision: SafetensorsDirectory) -> None:
    """Give every parameter the precision of its Hugging Face tensors."""
    table = rules(architecture)
    for name, parameter in global_parameters(model):
        entry = precision.entries[table[name].huggingface[0]]
        parameter.copy_(parameter.to(DTYPES[entry.dtype]))
