"""Measured efficiencies instead of assumed ones, from the JSON that tools/benchmarks/benchmark.py writes.

One GPU is measured there, so what can be fitted is compute: a factor for the matrix products with everything that is
proportional to tokens, and one for attention, which grows with the square of the length. One length gives one factor.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_solopo.architecture.gpus import GPUS, Efficiency, Gpu
from megatron_solopo.architecture.huggingface_config import ModelShape, read_architecture
from megatron_solopo.config import Config, parse_config
from megatron_solopo.errors import UserError
from megatron_solopo.plan.layouts import Layout, with_keys
from megatron_solopo.plan.search import LayoutEstimate, Planner
from megatron_solopo.plan.workload import Workload

_OURS = ("solopo", "long_po")


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """One measurement of a benchmark beside its estimate."""

    device: str
    system: str
    long_tokens: int
    seconds: float
    allocated_bytes: int | None
    estimate: LayoutEstimate

    @property
    def error(self) -> float:
        """Of the estimated step time, relative."""
        return self.estimate.time.seconds / self.seconds - 1


def measured(path: Path, gpu: Gpu | None = None, efficiency: Efficiency | None = None) -> list[MeasuredRun]:
    """The successful GPU measurements of `solopo` and `long_po` of a benchmark file, each with its estimate.

    Args:
        gpu: the type measured; None: found by the device's name, no rows where it is not in the table.

    Raises UserError where the file is no such benchmark.
    """
    try:
        benchmark = json.loads(path.read_text(encoding="utf-8"))
        device, rows = str(benchmark["device"]), benchmark["measurements"]
        fields, configs, sizes = benchmark["architecture"], benchmark["configs"], benchmark["sizes"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (--calibration)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a result of tools.benchmarks.benchmark: {type(error).__name__} {error}") from None
    gpu = gpu or next((each for each in GPUS.values() if each.device_name in device), None)
    if gpu is None or device == "cpu":
        return []
    architecture = _architecture(fields)
    found = []
    for row in rows:
        if row["system"] in _OURS and row["status"] == "ok":
            config = parse_config(configs[row["variant"] or next(iter(configs))], str(path))
            estimate = _estimate(architecture, config, gpu, efficiency or Efficiency(), sizes, row)
            seconds, memory = float(row["median_seconds"]), row["allocated_bytes"]
            found.append(MeasuredRun(device, row["system"], row["long_tokens"], seconds, memory, estimate))
    return found


def _architecture(fields: dict[str, Any]) -> ModelShape:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        return read_architecture(Path(folder))


def _estimate(
    architecture: ModelShape,
    config: Config,
    gpu: Gpu,
    efficiency: Efficiency,
    sizes: dict[str, Any],
    row: dict[str, Any],
) -> LayoutEstimate:
    """A step of the benchmark: every triplet is a pack of its own."""
    response, triplets = sizes["response_tokens"], sizes["triplets"]
    lengths = {"short": sizes["short_tokens"] - response, "long": row["long_tokens"] - response}
    workload = Workload(
        {name: np.full(triplets, length) for name, length in lengths.items()},
        {name: np.full(triplets, response) for name in ("chosen", "rejected")},
        triplets,
        "benchmark",
    )
    config = with_keys(
        config,
        objective={"name": row["system"]},
        data={"max_triplets_per_pack": 1, "max_tokens_per_pack": 4 * row["long_tokens"]},
        training={"global_batch_size": triplets},
    )
    planner = Planner(architecture, config, workload, gpu, 1, efficiency)
    return planner.estimate(Layout(config, 1))


def calibrated(path: Path, gpu: Gpu) -> Efficiency:
    """Efficiencies under which the estimates meet a benchmark's measurements, in the least squares of relative error.

    Raises UserError where the file holds no measurement of a GPU.
    """
    rows = measured(path, gpu)
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
    # The others were scaled along with the matrix products, not measured.
    limited = {name: float(min(value, 1.0)) for name, value in scaled.items()}
    return default.model_copy(update=limited | {"source": f"{path.name}, measured on {rows[0].device}"})


def _fit(shares: np.ndarray[Any, Any], two: bool) -> tuple[float, float]:
    """Factors f >= 0 with shares @ f nearest to 1."""
    if two:
        factors = np.linalg.lstsq(shares, np.ones(len(shares)), rcond=None)[0]
        if (factors > 0).all():
            return float(factors[0]), float(factors[1])
    total = shares.sum(axis=1)
    one = float(total.sum() / (total**2).sum())
    return one, one
