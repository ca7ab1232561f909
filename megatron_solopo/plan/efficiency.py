"""How much of a data sheet's figure a real kernel or collective reaches: assumptions, until a benchmark replaces them.

The defaults are round numbers of the size that public training reports show; none was measured with this project.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_Share = Annotated[float, Field(gt=0, le=1)]


class Efficiency(BaseModel):
    """Shares of the peak, and fixed costs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    gemm: _Share = 0.65
    """Matrix products in bfloat16."""
    fp8_gemm: _Share = 0.5
    """Matrix products in FP8, quantization included, of the FP8 peak."""
    attention: _Share = 0.5
    """Flash attention, forward and backward, of the bfloat16 peak."""
    head: _Share = 0.4
    """The output layer with its softmax."""
    memory: _Share = 0.75
    """Norms, rotation, activation function and residuals, of the memory's bandwidth."""
    nvlink: _Share = 0.75
    network: _Share = 0.75
    host: _Share = 0.75
    """PCIe, and the host's memory, which bounds Adam there."""
    message_seconds: float = 10e-6
    """Start of a collective or message."""
    overlap_of_context: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of attention's time behind which the ring of keys and values (p2p) can hide."""
    source: str = "assumptions, not measured"


class Reserve(BaseModel):
    """Memory that is not tensors of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    context_gib: float = 1.5
    """CUDA context, kernels, cuBLAS and Transformer Engine workspaces."""
    communicator_gib: float = 0.25
    """NCCL's buffers of each group that a rank talks in."""
    fragmentation: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Of everything allocated, lost between tensors (with expandable segments, which the trainer turns on)."""
