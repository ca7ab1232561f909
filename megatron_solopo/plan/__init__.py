"""Memory, time and cost of a run before it starts. Everything is arithmetic; only `dry_run` imports Megatron.

The settings of the command are here, so that its `--help` imports nothing slow.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_solopo.command_settings import CommandSettings

VARIED = ("recompute", "fp8", "offload", "cp_comm", "share_prompts", "lora")
"""What a search may choose besides the parallel sizes. `lora` compares adapters with the whole model."""


class PlanSettings(CommandSettings):
    """The options of `megatron-solopo plan`."""

    gpus: PositiveInt
    """Number of GPUs."""
    gpu: str
    """Type of GPU: a100, h100, h200, b200, ... or one of --gpu-file."""
    gpu_file: Path | None = None
    """YAML file with further GPU types."""
    tokens: str | None = None
    """Lengths to plan for, without prepared data in data.path: short=1024,long=8192:131072,response=512."""
    triplets: PositiveInt = 10_000
    """Number of triplets that have the lengths of --tokens."""
    vary: tuple[str, ...] = ("recompute", "offload", "cp_comm", "share_prompts")
    """What the plan chooses besides the sizes: recompute, offload, cp_comm, share_prompts, fp8. The config decides the
    others. lora shows training of adapters and of the whole model side by side."""
    calibration: Path | None = None
    """JSON of tools.benchmarks.benchmark: use its measured efficiencies, not the assumed ones."""
    expert_imbalance: Annotated[float, Field(ge=1)] | None = None
    """Tokens of a layer's fullest expert over the mean of its experts. A run logs it as moe/load_max_over_mean. Without
    the option, a model with experts has 1.5, which is an assumption."""
    price: PositiveFloat | None = None
    """Price of one GPU-hour."""
    top: Annotated[int, Field(ge=1, le=20)] = 5
    """Number of layouts to list."""
    explain: str | None = None
    """Show this layout in full, not the best one: tp=8,pp=4,cp=4,vpp=2; with experts also ep=8,etp=1."""
    why_not: bool = False
    """List every refused layout with its first reason."""
    dry_run: bool = False
    """Build the ranks of the chosen layout that differ, without a GPU, and compare their bytes with the estimate."""
    emit_sbatch: Path | None = None
    """Write submit.sbatch and config.yaml of the chosen layout into this directory."""
    picture: Path | None = None
    """Draw the memory of each stage and the timeline of the pipeline into this PNG file."""

    def contradictions(self) -> Iterator[str]:
        """Names in `vary` that nothing is called."""
        if unknown := [name for name in self.vary if name not in VARIED]:
            yield f"--vary {','.join(self.vary)}: unknown {', '.join(unknown)}; legal: {','.join(VARIED)}"
