"""Messages between two pipeline stages in a step, with and without the shapes that Megatron sends before each tensor.

    torchrun --nproc-per-node 2 -m tools.benchmarks.pipeline_messages

A small model with random weights runs 8 packs of different lengths. "With shapes" is Megatron's own communicator with
its defaults. "Without" is what training does: every stage knows all packs. The counts are those of both ranks together.
A "device wait" is a call of `torch.cuda.synchronize`, which waits for everything on the GPU.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor

from megatron_solopo.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.data.packing import Pack, TokenizedTriplet, build_pack
from megatron_solopo.model.build import build_model
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train import step
from megatron_solopo.train.policy import wrap_data_parallel
from tools.reporting import environment, table

PP2 = {"pipeline_model_parallel_size": 2}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "PP2": (PP2, False),
    "PP2, forward only": (PP2, True),
    "PP2 x VPP2": (PP2 | {"virtual_pipeline_model_parallel_size": 2}, False),
    "PP2 x VPP2, forward only": (PP2 | {"virtual_pipeline_model_parallel_size": 2}, True),
}
_MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_OBJECTIVE = ObjectiveConfig.model_validate({"loss_type": "simpo"})


@dataclass
class Counted:
    """What this rank sent in one step, and what the step computed."""

    messages: int = 0
    message_bytes: int = 0
    device_waits: int = 0
    losses: tuple[float, ...] = ()
    """Of each pack, on the last stage."""
    gradients: tuple[Tensor, ...] = ()

    def add(self, tensor: Tensor | None) -> None:
        """Count a tensor that is sent."""
        if tensor is not None:
            self.messages += 1
            self.message_bytes += tensor.numel() * tensor.element_size()

    def wait(self, device: Any = None) -> None:
        """Count a wait for the device."""
        self.device_waits += 1


@click.command(help=__doc__)
def main() -> None:
    """Print the table on rank 0."""
    dist.init_process_group("gloo")
    rows = []
    for name, (sizes, forward_only) in CASES.items():
        cells = []
        for shapes in (True, False):
            found = run_step(sizes, forward_only=forward_only, shapes=shapes)
            totals = torch.tensor([found.messages, found.message_bytes, found.device_waits])
            dist.all_reduce(totals)
            messages, size, waits = totals.tolist()
            cells.append(f"{messages}: {size:,} bytes, {waits}")
        rows.append([name, *cells])
    if dist.get_rank() == 0:
        click.echo("\n".join(f"{name}: {value}" for name, value in environment().items()) + "\n")
        click.echo(table(["layout", "with shapes: bytes, device waits", "without: bytes, device waits"], rows))
    dist.destroy_process_group()


def run_step(sizes: dict[str, Any], *, forward_only: bool, shapes: bool) -> Counted:
    """Run a step's passes on this rank and count what it sends; `shapes`: as Megatron does by itself."""
    parallel = ParallelConfig(**sizes)
    groups = topology.initialize(parallel, seed=1)
    try:
        chunks = _model(parallel, groups)
        for chunk in chunks:
            chunk.module.config.batch_p2p_sync |= shapes
        loss = step.objective_loss(_OBJECTIVE, None, groups)
        with _counting(shapes) as counted:
            reports = step.run_schedule(chunks, _packs(groups), loss, groups, forward_only=forward_only)
        counted.losses = tuple(float(report[0]) for report in reports)
        if not forward_only:
            counted.gradients = tuple(weight.main_grad.clone() for chunk in chunks for weight in chunk.parameters())
        return counted
    finally:
        topology.destroy(groups)


@contextmanager
def _counting(shapes: bool) -> Iterator[Counted]:
    """Count what leaves this rank. Tensors go by `_p2p_ops` or, as shapes always do, in a batch."""
    counted = Counted()
    in_batch, one_by_one = dist.batch_isend_irecv, p2p_communication._p2p_ops

    def batch(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            counted.add(operation.tensor if operation.op is dist.isend else None)
        return in_batch(operations)

    def single(**tensors: Any) -> Any:
        counted.add(tensors["tensor_send_prev"])
        counted.add(tensors["tensor_send_next"])
        return one_by_one(**tensors)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", batch))
        stack.enter_context(mock.patch.object(p2p_communication, "_p2p_ops", single))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", counted.wait))
        if shapes:
            stack.enter_context(mock.patch.object(step, "without_shape_messages", lambda *_: {}))
        yield counted


def _model(parallel: ParallelConfig, groups: Topology) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_MODEL))
        model = resolve_model(ModelConfig(path=Path(folder)), parallel)
    chunks = build_model(model, chunk_tokens=1024, device=groups.device)
    for number, chunk in enumerate(chunks):
        # The two copies of tied embeddings, on the first and on the last stage, start alike.
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, weight in chunk.named_parameters():
                seeded = torch.Generator().manual_seed(7) if weight.shape[0] == _MODEL["vocab_size"] else generator
                weight.add_(torch.randn(weight.shape, generator=seeded).to(weight) / 10)
                assert "norm" in name or weight.dim() > 1
    return wrap_data_parallel(chunks, OptimizerConfig(use_distributed_optimizer=False), parallel)


def _packs(groups: Topology) -> list[Pack]:
    random = np.random.default_rng(0)

    def tokens(low: int, high: int) -> Any:
        return random.integers(0, 256, random.integers(low, high))

    rows = [
        TokenizedTriplet(
            id=str(index),
            index=index,
            prompts={"short": tokens(4, 16), "long": tokens(16, 64)},
            responses={"chosen": tokens(2, 9), "rejected": tokens(2, 9)},
        )
        for index in range(8)
    ]
    return [
        build_pack([row], _OBJECTIVE.roles.all, groups.sequence_multiple, groups.pack_multiple(), share_prompts=False)
        for row in rows
    ]


if __name__ == "__main__":
    main()
