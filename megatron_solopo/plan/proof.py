"""Which ranks of a layout differ, and what a dry run of one of them says beside the estimate."""

from dataclasses import dataclass
from typing import Any

from megatron_solopo.plan.layouts import Layout


@dataclass(frozen=True)
class Proof:
    """One rank, built without memory."""

    rank: int
    place: str
    """Which stage, and which part of the optimizer's state."""
    num_parameters: int
    built: tuple[int, int, int]
    """Bytes of parameter buffers, gradient buffers and optimizer state as Megatron-Core allocates them."""
    estimated: tuple[int, int, int]
    saved_bytes: int
    """Most that autograd kept alive at any moment of the real schedule, with plain PyTorch layers."""
    estimated_saved_bytes: float
    seconds: float

    @property
    def difference(self) -> str:
        """Which of the exact figures disagree, and by how much; empty where none does."""
        names = ("parameters", "gradients", "optimizer")
        pairs = zip(names, self.built, self.estimated, strict=True)
        return ", ".join(f"{name} {mine - real:+,}" for name, real, mine in pairs if mine != real)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return vars(self) | {"equal": not self.difference}


def distinct_ranks(layout: Layout) -> dict[int, str]:
    """Global ranks of all shapes that differ, in Megatron's order (TP, CP, DP, PP), with their places.

    Stages differ by what they hold (embedding, layers, head); along data-parallel and context-parallel ranks, the last
    owns the padding at the buffers' ends. Tensor-parallel ranks are alike.
    """
    parallel = layout.config.parallel
    size = parallel.pipeline_model_parallel_size
    per_stage = layout.data_parallel_size * parallel.context_parallel_size * parallel.tensor_model_parallel_size
    stages = {0: "first stage", size // 2: "middle stage", size - 1: "last stage"}
    if size == 1:
        stages = {0: "only stage"}
    found = {}
    for stage, name in sorted(stages.items()):
        found[stage * per_stage] = f"{name}, first shard"
        if per_stage > 1:
            found[(stage + 1) * per_stage - 1] = f"{name}, last shard"
    return found
