"""What GPUs can do, for plans and for the MFU of a run: one table from NVIDIA's data sheets, and assumed efficiencies.

Peaks are dense (no sparsity) and per GPU; links are per direction. Users add types in a YAML file:

    my-gpu: {device_name: B300, memory_gib: 268, bf16_tflops: 2250, fp8_tflops: 4500, hbm_gb_per_s: 8000,
             nvlink_gb_per_s: 900, network_gb_per_s: 50, pcie_gb_per_s: 64, host_gb_per_s: 50, gpus_per_node: 8}

`Efficiency` states how much of such a peak a real kernel or collective reaches. Its defaults are round numbers of the
size that public training reports show. They are assumptions until a benchmark of the GPU replaces them.
"""

import io
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from yaml import YAMLError

from megatron_solopo.config import FP8Recipe, ModelConfig
from megatron_solopo.errors import UserError, first_problem

FP8_QUESTIONS: dict[FP8Recipe, str] = {
    "blockwise": "is_fp8_block_scaling_available",
    "tensorwise": "is_fp8_available",
    "delayed": "is_fp8_available",
    "mxfp8": "is_mxfp8_available",
}
"""The function of `transformer_engine.pytorch` that says whether the current device computes a recipe."""


class Gpu(BaseModel):
    """One GPU in its usual node."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    device_name: str
    """A part of the name that CUDA gives the device."""
    memory_gib: PositiveFloat
    """What a process can allocate, CUDA's own context included."""
    bf16_tflops: PositiveFloat
    fp8_tflops: PositiveFloat | None = None
    """None if the type has no FP8."""
    has_mxfp8: bool = False
    """Whether it scales blocks of 32 (`fp8_recipe: mxfp8`)."""
    hbm_gb_per_s: PositiveFloat
    nvlink_gb_per_s: PositiveFloat
    """To the other GPUs of the node, per direction: half of what data sheets state for both."""
    network_gb_per_s: PositiveFloat = 50.0
    """To other nodes, per GPU and direction: 400 Gb/s adapters, one per GPU."""
    pcie_gb_per_s: PositiveFloat = 64.0
    """To the host, per direction."""
    host_gb_per_s: PositiveFloat = 50.0
    """One GPU's share of the host's memory bandwidth: 400 GB/s for eight."""
    gpus_per_node: PositiveInt = 8


def _sheet(name: str, gib: float, bf16: float, fp8: float | None, hbm: float, nvlink: float, **more: Any) -> Gpu:
    values: dict[str, Any] = {"device_name": name, "memory_gib": gib, "bf16_tflops": bf16, "fp8_tflops": fp8}
    return Gpu(**values, hbm_gb_per_s=hbm, nvlink_gb_per_s=nvlink, **more)


# `bf16_peak` takes the first entry whose name is part of the device's name, so the order matters.
GPUS: dict[str, Gpu] = {
    "a100": _sheet("A100", 79.1, 312, None, 2039, 300, pcie_gb_per_s=32, network_gb_per_s=25),
    "h100-pcie": _sheet("H100 PCIe", 79.1, 756, 1513, 2000, 64),
    "h100-nvl": _sheet("H100 NVL", 93.1, 835, 1671, 3900, 300),
    "h100": _sheet("H100", 79.1, 989, 1979, 3350, 450),
    "h200": _sheet("H200", 139.8, 989, 1979, 4800, 450),
    "gb200": _sheet("GB200", 184.0, 2500, 5000, 8000, 900, gpus_per_node=4, has_mxfp8=True),
    "b200": _sheet("B200", 178.0, 2250, 4500, 8000, 900, has_mxfp8=True),
}


def bf16_peak(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a CUDA device by its name, or None if the table does not have it."""
    return next((gpu.bf16_tflops * 1e12 for gpu in GPUS.values() if gpu.device_name in device_name), None)


def read_gpus(path: Path | None) -> dict[str, Gpu]:
    """Return the table with the types of a YAML file added or replaced.

    Raises UserError naming the file, the type and the wrong field.
    """
    if path is None:
        return GPUS
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (--gpu-file)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    try:
        # OmegaConf refuses a key that is there twice; PyYAML takes the last.
        loaded = OmegaConf.load(io.StringIO(text))
    # OmegaConf raises OSError for a file that holds a bare number or word.
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    given = OmegaConf.to_container(loaded)
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected GPU types and their fields, {', '.join(Gpu.model_fields)}")
    types = {str(name).lower(): _parse(path, str(name), fields) for name, fields in given.items()}
    if len(types) < len(given):
        names = ", ".join(map(str, given))
        raise UserError(f"{path}: a type is there twice, since upper and lower case are the same: {names}")
    return GPUS | types


def _parse(path: Path, name: str, fields: Any) -> Gpu:
    try:
        return Gpu.model_validate(fields)
    except ValidationError as error:
        problem = first_problem(error, "all of it")
        raise UserError(f"{path}: {name}.{problem}; the fields are {', '.join(Gpu.model_fields)}") from None


def find_gpu(name: str, gpus: dict[str, Gpu]) -> Gpu:
    """Look up a type; raises UserError listing the known ones."""
    if name.lower() not in gpus:
        raise UserError(f"--gpu {name}: unknown; known: {', '.join(gpus)}, or add it in a YAML file with --gpu-file")
    return gpus[name.lower()]


def has_fp8(gpu: Gpu, recipe: str) -> bool:
    """Whether a type computes FP8 with a recipe of `model.fp8_recipe`."""
    return gpu.fp8_tflops is not None and (recipe != "mxfp8" or gpu.has_mxfp8)


def check_fp8_of(gpu: Gpu, model: ModelConfig) -> None:
    """Refuse an FP8 recipe that a type does not have; raises UserError naming the keys."""
    if model.fp8 is not None and not has_fp8(gpu, model.fp8_recipe):
        others = "" if gpu.fp8_tflops is None else ", or model.fp8_recipe to blockwise or tensorwise"
        raise UserError(
            f"model.fp8={model.fp8} with model.fp8_recipe={model.fp8_recipe}: {gpu.device_name} has no such FP8; "
            f"set model.fp8 to null{others}"
        )


_Share = Annotated[float, Field(gt=0, le=1)]


class Efficiency(BaseModel):
    """Shares of a GPU's peaks that are reached, and fixed costs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

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
    """PCIe and the host's memory. The latter bounds Adam on the host."""
    message_seconds: float = 10e-6
    """Time to start a collective or a message."""
    overlap_of_context: Annotated[float, Field(ge=0, le=1)] = 0.9
    """The share of attention's time that can hide the ring exchange of keys and values (p2p)."""
    source: str = "assumptions, not measured"


class Reserve(BaseModel):
    """Memory that holds no tensors of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    context_gib: float = 1.5
    """CUDA context, kernels, cuBLAS and Transformer Engine workspaces."""
    communicator_gib: float = 0.25
    """NCCL's buffers for each process group of a rank."""
    fragmentation: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of allocated memory that is lost between tensors. The trainer turns on expandable segments."""
