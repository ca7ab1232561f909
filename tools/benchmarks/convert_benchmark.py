#!/usr/bin/env python3
"""Measure wall time and peak memory of `convert import` and `convert export` beside a plain copy of the same bytes.

    python -m tools.benchmarks.convert_benchmark --json convert.json

The model has random weights and the sizes of Qwen2.5-1.5B with an untied head: 3.55 GB in bfloat16. Each measurement
is a process of its own, with the command that a user runs. The copy writes to the disk (fsync), as the conversions do.
A copy is slower in memory that was not used before. So each conversion has its own copy, by turns before and after it.
The table shows medians of the repeats. The tool fails if a conversion exceeds its memory bound. Linux only.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.checkpoint.huggingface_weights import SafetensorsWriter
from megatron_solopo.checkpoint.mapping import all_huggingface_shapes
from megatron_solopo.files import write_json
from tools.reporting import environment, table

_GB, _MIB, _GIB = 10**9, 2**20, 2**30
_POLL_SECONDS = 0.02
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
COPY = "import os, pathlib, shutil, sys\nsource, target = map(pathlib.Path, sys.argv[1:])\ntarget.mkdir()\n" + (
    "for file in source.iterdir():\n    shutil.copyfile(file, target / file.name)\n"
    "    with open(target / file.name, 'rb') as stream:\n        os.fsync(stream.fileno())\n"
)


def make_model(path: Path) -> tuple[int, int]:
    """Write the model, one random tensor at a time; returns the bytes of the model and of its largest tensor."""
    path.mkdir()
    write_json(path / "config.json", CONFIG)
    architecture = read_architecture(path)
    shapes = all_huggingface_shapes(architecture)
    meta = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    writer = SafetensorsWriter(path, meta, max_shard_bytes=5 * _GB)
    torch.manual_seed(0)
    for name, shape in shapes.items():
        writer.write(name, torch.randn(shape).mul_(0.02).bfloat16())
    writer.finish()
    sizes = [tensor.nbytes for tensor in meta.values()]
    return sum(sizes), max(sizes)


def run(command: Sequence[str]) -> tuple[float, int]:
    """Run a process; returns its seconds and its peak resident bytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    # The kernel keeps the peak, so only a peak in the last moment is missed. (ru_maxrss starts with the parent's.)
    while process.poll() is None:
        peak = max(peak, high_water(process.pid))
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise click.ClickException(f"failed: {' '.join(command)}")
    return time.monotonic() - started, peak


def high_water(pid: int) -> int:
    """Peak resident bytes of a process so far, with mapped files, or 0 if it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024 if lines else 0


@dataclass(frozen=True)
class Work:
    """A command and its output directory."""

    name: str
    command: list[str]
    output: Path

    def run(self) -> tuple[float, int]:
        """Flush the disks, remove the output of an earlier run, and run the command."""
        shutil.rmtree(self.output, ignore_errors=True)
        os.sync()
        return run(self.command)


@dataclass(frozen=True)
class Pair:
    """One conversion and its copy."""

    seconds: float
    copy_seconds: float
    peak_bytes: int

    @property
    def of_copy(self) -> float:
        """The throughput of the conversion divided by that of the copy."""
        return self.copy_seconds / self.seconds


def conversions(folder: Path) -> list[Work]:
    """The commands to measure. Each export comes after the import that it reads."""
    convert = [sys.executable, "-m", "megatron_solopo", "convert"]
    source, megatron = folder / "source", folder / "megatron"
    found = []
    for name, verification in (("unverified", "none"), ("every bit compared", "tensors")):
        for work, key, read, written in (
            ("import", "--hf", source, megatron),
            ("export", "--checkpoint", megatron, folder / "exported"),
        ):
            arguments = [work, key, str(read), "--out", str(written), "--verify", verification]
            found.append(Work(f"{work}, {name}", [*convert, *arguments], written))
    return found


def measure(folder: Path, repeats: int) -> dict[str, list[Pair]]:
    """Run every conversion with its copy, `repeats` times."""
    copy = Work("copy", [sys.executable, "-c", COPY, str(folder / "source"), str(folder / "copied")], folder / "copied")
    found: dict[str, list[Pair]] = {}
    for repeat in range(repeats):
        for work in conversions(folder):
            measured = {each.name: each.run() for each in ((copy, work) if repeat % 2 else (work, copy))}
            pair = Pair(measured[work.name][0], measured["copy"][0], measured[work.name][1])
            found.setdefault(work.name, []).append(pair)
            click.echo(f"{work.name}: {pair.seconds:.1f} s, copy {pair.copy_seconds:.1f} s", err=True)
            shutil.rmtree(copy.output)
    return found


def rows(found: dict[str, list[Pair]], nbytes: int) -> list[dict[str, Any]]:
    return [
        {
            "work": name,
            "seconds": (seconds := statistics.median(pair.seconds for pair in pairs)),
            "gb_per_second": nbytes / _GB / seconds,
            "of_copy": statistics.median(pair.of_copy for pair in pairs),
            "peak_bytes": max(pair.peak_bytes for pair in pairs),
            "pairs": [asdict(pair) for pair in pairs],
        }
        for name, pairs in found.items()
    ]


@click.command(help=__doc__.replace("    python", "\b\n    python"))
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Parent of the work directory. Default: the system's temporary directory.",
)
@click.option("--repeats", type=click.IntRange(1), default=4, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
def main(folder: Path | None, repeats: int, json_path: Path | None) -> None:
    """Measure, print a table, write JSON."""
    result = environment()
    with tempfile.TemporaryDirectory(dir=folder) as work:
        nbytes, largest = make_model(Path(work) / "source")
        measured = rows(measure(Path(work), repeats), nbytes)
    bound = 2 * _GIB + 3 * largest
    result |= {"bytes": nbytes, "largest_tensor_bytes": largest, "memory_bound_bytes": bound}
    result["load_average_after"] = os.getloadavg()[0]
    click.echo("\n".join(f"{key}: {value}" for key, value in result.items()) + "\n")
    cells = [
        [
            row["work"],
            f"{row['seconds']:.1f}",
            " ".join(f"{pair['seconds']:.1f}/{pair['copy_seconds']:.1f}" for pair in row["pairs"]),
            f"{row['gb_per_second']:.2f}",
            f"{row['of_copy']:.2f}",
            f"{row['peak_bytes'] / _MIB:,.0f}",
        ]
        for row in measured
    ]
    titles = ("work", "median s", "all s / copy s", "GB/s", "of the copy's", "peak resident MiB")
    click.echo(table(titles, cells))
    if json_path:
        json_path.write_text(json.dumps(result | {"rows": measured}, indent=2) + "\n", encoding="utf-8")
    if (worst := max(row["peak_bytes"] for row in measured)) > bound:
        raise click.ClickException(f"peak memory {worst / _MIB:,.0f} MiB exceeds the bound {bound / _MIB:,.0f} MiB")


if __name__ == "__main__":
    main()
