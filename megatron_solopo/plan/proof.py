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
    saved_bytes: int | None
    """Most that autograd kept alive at any moment of the real schedule, with plain PyTorch layers; None: not run."""
    estimated_saved_bytes: float | None
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


@dataclass(frozen=True)
class DistinctRank:
    """A rank that stands for all that are like it."""

    rank: int
    place: str
    runs_schedule: bool
    """Whether its activations stand for its stage's: it is the first on each axis, which has most response rows."""


def distinct_ranks(layout: Layout) -> list[DistinctRank]:
    """Ranks of all shapes that differ, by Megatron's order (TP, CP, DP, PP).

    Stages differ by what they hold (embedding, layers, head); along data-parallel and context-parallel ranks, the last
    owns the padding at the buffers' ends. Tensor-parallel ranks are alike.
    """
    parallel = layout.config.parallel
    size = parallel.pipeline_model_parallel_size
    per_stage = layout.data_parallel_size * parallel.context_parallel_size * parallel.tensor_model_parallel_size
    stages = {0: "first stage", size // 2: "middle stage", size - 1: "last stage"} if size > 1 else {0: "only stage"}
    found = []
    for stage, name in sorted(stages.items()):
        found.append(DistinctRank(stage * per_stage, f"{name}, first shard", True))
        if per_stage > 1:
            found.append(DistinctRank((stage + 1) * per_stage - 1, f"{name}, last shard", False))
    return found
