"""What a save and a resume cost each data-parallel rank in host memory and in time, on a CPU with gloo.

    torchrun --nproc-per-node 2 -m tools.benchmarks.save_benchmark --json benchmark.json

A Llama of about 133 million parameters in bfloat16 with random weights and an invented state of Adam. On a CPU both are
in host memory already. What is measured is what a save and a resume take beyond that.
"""
# ruff: noqa: E402  (megatron's warnings of what is not installed must be off before it is imported)

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.checkpoint.host_copies import HostCopies
from megatron_solopo.checkpoint.load import load_checkpoint
from megatron_solopo.checkpoint.save import ShardedSave
from megatron_solopo.checkpoint.sharded_state import state_to_save
from megatron_solopo.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.model.build import build_model
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.parallel.megatron_internals import initialize_adam_state, optimizer_parts
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.policy import build_optimizer, wrap_data_parallel

_MIB = 1 << 20
_COLUMNS = {
    "save": "save, peak MiB",
    "background": "in the background, peak MiB",
    "resume": "resume, peak MiB",
    "save_seconds": "save s",
    "reserving_seconds": "blocked s, reserving memory",
    "reserved_seconds": "thread s, reserving memory",
    "first_blocked_seconds": "blocked s, first",
    "blocked_seconds": "blocked s, later",
    "written": "written MiB",
}


def main() -> None:
    """Save, save in the background, load; rank 0 prints a line for every rank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind, at least 2; times are medians")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file for the figures of all ranks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = topology.initialize(ParallelConfig(), seed=1)
    folder = on_rank_0(lambda: Path(tempfile.mkdtemp(dir=options.folder)))
    try:
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, _measure(folder, options.layers, options.repeats, groups))
    finally:
        on_rank_0(lambda: shutil.rmtree(folder))
    if dist.get_rank() == 0:
        _print(ranks)
        if options.json:
            options.json.write_text(json.dumps(ranks, indent=1) + "\n")
    topology.destroy(groups)
    dist.destroy_process_group()


def _print(ranks: list[dict[str, float]]) -> None:
    print(f"{ranks[0]['parameters']:,} parameters")
    print("| rank | " + " | ".join(_COLUMNS.values()) + " |")
    print("| ---: " * (len(_COLUMNS) + 1) + "|")
    for rank, figures in enumerate(ranks):
        shown = (f"{figures[name] / (1 if 'seconds' in name else _MIB):,.2f}" for name in _COLUMNS)
        print(f"| {rank} | {' | '.join(shown)} |")


def _measure(folder: Path, layers: int, repeats: int, groups: Topology) -> dict[str, float]:
    chunks, optimizer = _make_policy(folder, layers, groups)
    saves = [_save(folder / "at once", chunks, optimizer, None) for _ in range(repeats)]
    copies, memory, started = HostCopies(), _PeakMemory(), time.monotonic()
    # As training does after its first update: a thread fills the memory, and steps go on.
    copies.reserve(state_to_save(chunks, optimizer))
    reserving = time.monotonic() - started
    copies.wait()
    reserved, kept = time.monotonic() - started, memory.peak()
    first, *later = [_save(folder / "background", chunks, optimizer, copies) for _ in range(repeats)]
    copies.close()
    memory = _PeakMemory()
    load_checkpoint(folder / "background" / "iter_0000001", chunks, optimizer)
    return {
        "parameters": sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        "save": max(each.peak for each in saves),
        "background": kept + max(each.peak for each in (first, *later)),
        "resume": memory.peak(),
        "save_seconds": statistics.median(each.seconds for each in saves),
        "reserving_seconds": reserving,
        "reserved_seconds": reserved,
        "first_blocked_seconds": first.blocked,
        "blocked_seconds": statistics.median(each.blocked for each in later),
        "written": first.written,
    }


@dataclass(frozen=True)
class _Save:
    """What a save took on this rank, in seconds and bytes."""

    seconds: float
    blocked: float
    """Until training could go on."""
    peak: int
    written: int


def _save(root: Path, chunks: Any, optimizer: Any, copies: HostCopies | None) -> _Save:
    """Save once; in the background, if there are `copies`."""
    on_rank_0(lambda: shutil.rmtree(root, ignore_errors=True))
    memory, started = _PeakMemory(), time.monotonic()
    in_background = copies is not None
    save = ShardedSave(root, chunks, optimizer, {"step": 1}, {}, copies=copies, in_background=in_background)
    blocked = time.monotonic() - started
    path = save.complete()
    seconds, peak = time.monotonic() - started, memory.peak()
    written = sum(file.stat().st_size for file in path.glob(f"__{dist.get_rank()}_*.distcp"))
    dist.barrier()  # the next save removes the folder
    return _Save(seconds, blocked, peak, written)


def _make_policy(folder: Path, layers: int, groups: Topology) -> tuple[Any, Any]:
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=42_000,
        tie_word_embeddings=True,
    )
    on_rank_0(lambda: config.save_pretrained(folder / "model"))
    architecture = read_architecture(folder / "model")
    model = resolve_model(
        ModelConfig(path=folder / "model", dtype="bfloat16"), ParallelConfig(), architecture=architecture
    )
    settings = OptimizerConfig()
    chunks = wrap_data_parallel(build_model(model, chunk_tokens=8, device=groups.device), settings, ParallelConfig())
    optimizer = build_optimizer(chunks, settings)
    initialize_adam_state(optimizer)
    for state in optimizer_parts(optimizer)[0].optimizer.state.values():
        state["exp_avg"].normal_()
    return chunks, optimizer


class _PeakMemory:
    """The process's peak resident memory from now on, beyond what is resident now."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
        self._before = _resident("VmRSS")

    def peak(self) -> int:
        """In bytes."""
        return _resident("VmHWM") - self._before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


if __name__ == "__main__":
    main()
