"""Measured efficiencies, which replace the assumed ones. They come from the JSON of tools/benchmarks/benchmark.py.

The benchmark measures one GPU, so only compute can be fitted. One factor is for the matrix products and everything else
that grows with the number of tokens. Another is for attention, which grows with the square of the length. Measurements
at a single length give one factor for both.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from megatron_solopo.architecture.gpus import GPUS, Efficiency, Gpu
from megatron_solopo.architecture.huggingface_config import ModelShape, read_architecture
from megatron_solopo.config import Config, parse_config
from megatron_solopo.errors import UserError, first_problem
from megatron_solopo.plan.layouts import Layout, replace_settings
from megatron_solopo.plan.search import LayoutEstimate, Planner
from megatron_solopo.plan.workload import Workload

_SYSTEMS = ("solopo", "long_po")


class _Sizes(BaseModel):
    short_tokens: PositiveInt
    response_tokens: PositiveInt
    triplets: PositiveInt


class _Measurement(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    system: str
    long_tokens: PositiveInt
    variant: str
    status: str
    median_seconds: PositiveFloat | None = None


class _Benchmark(BaseModel):
    """What is read of a benchmark's file."""

    device: str
    architecture: dict[str, Any]
    configs: dict[str, Any]
    sizes: _Sizes
    measurements: list[_Measurement]


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """One measurement of a benchmark, and the estimate for it."""

    device: str
    system: str
    long_tokens: int
    seconds: float
    estimate: LayoutEstimate

    @property
    def error(self) -> float:
        """Relative error of the estimated step time."""
        return self.estimate.time.seconds / self.seconds - 1


def read_measurements(path: Path, gpu: Gpu | None = None, efficiency: Efficiency | None = None) -> list[MeasuredRun]:
    """The successful GPU measurements of `solopo` and `long_po` in a benchmark's file, each with its estimate.

    Args:
        gpu: the type that was measured. None: the type in the table whose name is part of the device's name; without
            such a type, there are no measurements.
        efficiency: what the estimates assume; None: the defaults.

    Raises UserError if the file is no such benchmark.
    """
    try:
        benchmark = _Benchmark.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (--calibration)") from None
    except ValidationError as error:
        raise UserError(
            f"{path}: not a result of tools.benchmarks.benchmark: {first_problem(error, 'the file')}"
        ) from None
    gpu = gpu or next((each for each in GPUS.values() if each.device_name in benchmark.device), None)
    if gpu is None or benchmark.device == "cpu":
        return []
    architecture = _read_architecture(benchmark.architecture)
    found = []
    for row in benchmark.measurements:
        if row.system in _SYSTEMS and row.status == "ok":
            if row.median_seconds is None:
                raise UserError(
                    f"{path}: not a result of tools.benchmarks.benchmark: median_seconds is missing in {row}"
                )
            config = parse_config(benchmark.configs[row.variant or next(iter(benchmark.configs))], str(path))
            estimate = _estimate(architecture, config, gpu, efficiency or Efficiency(), benchmark.sizes, row)
            found.append(MeasuredRun(benchmark.device, row.system, row.long_tokens, row.median_seconds, estimate))
    return found


def _not_a_benchmark(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: not a result of tools.benchmarks.benchmark: {problem} (--calibration)")


def _read_architecture(fields: dict[str, Any]) -> ModelShape:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        return read_architecture(Path(folder))


def _estimate(
    architecture: ModelShape, config: Config, gpu: Gpu, efficiency: Efficiency, sizes: _Sizes, row: _Measurement
) -> LayoutEstimate:
    """Estimate a step of the benchmark, in which every triplet is a pack of its own."""
    response, triplets = sizes.response_tokens, sizes.triplets
    lengths = {"short": sizes.short_tokens - response, "long": row.long_tokens - response}
    workload = Workload(
        {name: np.full(triplets, length) for name, length in lengths.items()},
        {name: np.full(triplets, response) for name in ("chosen", "rejected")},
        triplets,
        "benchmark",
    )
    config = replace_settings(
        config,
        objective={"name": row.system},
        data={"max_triplets_per_pack": 1, "max_tokens_per_pack": 4 * row.long_tokens},
        training={"global_batch_size": triplets},
    )
    planner = Planner(architecture, config, workload, gpu, 1, efficiency)
    return planner.estimate(Layout(config, 1))


def calibrate_efficiency(path: Path, gpu: Gpu) -> Efficiency:
    """Efficiencies that minimise the squared relative errors of the estimates for a benchmark's measurements.

    Raises UserError if the file holds no measurement of this type of GPU, or an impossible one.
    """
    rows = read_measurements(path, gpu)
    if not rows:
        raise UserError(f"{path}: holds no measurement of solopo or long_po on a GPU (--calibration)")
    if gpu.device_name not in rows[0].device:
        raise UserError(f"{path}: measured on {rows[0].device}, which is no {gpu.device_name} (--gpu, --calibration)")
    times = np.array([row.seconds for row in rows])
    attention = np.array([row.estimate.time.compute.attention for row in rows])
    rest = np.array([row.estimate.time.seconds for row in rows]) - attention
    factors = _fit(np.stack([rest / times, attention / times], axis=1), len({row.long_tokens for row in rows}) > 1)
    default = Efficiency()
    scaled = {name: getattr(default, name) / factors[0] for name in ("gemm", "fp8_gemm", "head", "memory")}
    scaled["attention"] = default.attention / factors[1]
    if (best := max(scaled["gemm"], scaled["attention"])) > 1:
        raise UserError(
            f"{path}: computes {best:.2f} times as fast as {gpu.device_name}'s data sheet allows; is the type right? "
            "(--calibration)"
        )
    # The other efficiencies are not measured. They are scaled together with that of the matrix products.
    limited = {name: float(min(value, 1.0)) for name, value in scaled.items()}
    return default.model_copy(update=limited | {"source": f"{path.name}, measured on {rows[0].device}"})


def _fit(shares: np.ndarray[Any, Any], several_lengths: bool) -> tuple[float, float]:
    """Factors f >= 0 that bring shares @ f nearest to 1."""
    if several_lengths:
        factors = np.linalg.lstsq(shares, np.ones(len(shares)), rcond=None)[0]
        if (factors > 0).all():
            return float(factors[0]), float(factors[1])
    total = shares.sum(axis=1)
    one = float(total.sum() / (total**2).sum())
    return one, one
