"""A step's forward and backward passes: the host reads no number from the device in between."""

import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_solopo.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.data.packing import build_pack
from megatron_solopo.model.build import build_model
from megatron_solopo.model.microbatch import shard_pack
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.policy import wrap_data_parallel
from megatron_solopo.train.step import ReferenceLogprobs, objective_loss, run_microbatches
from tests.parity.layouts import tokenized
from tests.ranks import layout, two_ranks
from tests.scoring import make_row
from tests.tiny_models import make_model

# torch's causal masks, which attention on a CPU uses under context parallelism, do not work under a dispatch mode.
LAYOUTS = {"dp2": {}, "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
LOSSES = ("dpo", "simpo", "orpo", "ipo", "cpo")
ATEN = torch.ops.aten
# What makes the host wait for the device: a number as a Python scalar, a mask as an index, a constant as a tensor.
WAITING = (ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.lift_fresh.default)
PACKAGES = {"megatron_solopo", "megatron"}


class HostReads(TorchDispatchMode):
    """Our lines that make the host wait. Megatron's own lines do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITING:
            paths = [(Path(frame.filename), frame) for frame in traceback.extract_stack()]
            # `cpu.py` stands between Megatron and torch: it passes on what Megatron asks for.
            inner = [(path, frame) for path, frame in paths if set(path.parts) & PACKAGES and path.name != "cpu.py"]
            path, frame = inner[-1]
            if "megatron_solopo" in path.parts:
                self.lines.add(f"{path.name}:{frame.lineno}: {frame.line}")
        return function(*args, **(kwargs or {}))


def reads(loss_type: str, sizes: dict[str, Any], groups: Topology, path: Path) -> set[str]:
    objective = ObjectiveConfig.model_validate({"loss_type": loss_type, "nll_coefficient": 0.1})
    roles = objective.roles.all
    resolved = resolve_model(ModelConfig(path=path), ParallelConfig(**sizes))
    chunks = wrap_data_parallel(
        build_model(resolved, chunk_tokens=16, device=groups.device), OptimizerConfig(), resolved.parallel
    )
    multiples = groups.sequence_multiple, groups.pack_multiple()
    packs = [build_pack([tokenized(make_row(), index)], roles, *multiples, share_prompts=False) for index in range(2)]
    loss = objective_loss(objective, ReferenceLogprobs(roles, torch.zeros(2, len(roles))), groups)
    microbatches = [shard_pack(pack, groups) for pack in packs]
    positions = [each.tokens_1t.shape[1] for each in microbatches]
    with HostReads() as found:
        run_microbatches(chunks, microbatches, positions, loss, forward_only=False)
    return found.lines


def on_two_ranks() -> dict[str, dict[str, set[str]]]:
    """Our lines that waited, by layout and loss."""
    told: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    path, found = Path(told[0]), {}
    for name, sizes in LAYOUTS.items():
        with layout(**sizes) as groups:
            on_rank_0(lambda: make_model(path, "llama3"))
            found[name] = {loss: reads(loss, sizes, groups, path) for loss in LOSSES}
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_host_does_not_wait_for_the_device_within_a_step(name: str) -> None:
    for rank in two_ranks(__name__):
        assert not any(rank[name].values()), rank[name]


def test_a_number_that_our_code_reads_is_seen() -> None:
    pack = build_pack([tokenized(make_row(), 0)], ObjectiveConfig().roles.all, 1, share_prompts=False)
    with HostReads() as found:
        assert pack.num_tokens > 0
    (line,) = found.lines
    assert line.startswith("packing.py:") and "self.prompt_lengths_B.sum()" in line
