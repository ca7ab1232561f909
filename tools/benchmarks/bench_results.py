"""Starts the processes of `benchmark.py`, takes what they report, and writes it down after every measurement."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.files import write_json
from tools.benchmarks.bench_case import LONG_PO, OK, TRL, Plan
from tools.benchmarks.bench_report import Row, agreement, complete, ratios

warnings.filterwarnings("ignore", module=r"megatron\.core")  # of what is not installed here
ROOT = Path(__file__).resolve().parents[2]


def worker_environment() -> dict[str, str]:
    """No trace of a launcher, nothing from the network, and an allocator that does not fragment."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = {name: value for name, value in os.environ.items() if name not in launcher}
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "KINETO_LOG_LEVEL": "99",
    }
    # torch 2.13 reads PYTORCH_ALLOC_CONF only without the older name.
    allocator = {} if "PYTORCH_ALLOC_CONF" in values else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if is_cpu() else {}
    return defaults | allocator | values | hidden


def run_worker(module: str, plan_file: Path) -> Iterator[dict[str, Any]]:
    """Start a process and yield what it reports; the last message says so if it did not end well."""
    receive, send = os.pipe()
    command = [sys.executable, "-m", module, str(plan_file), str(send)]
    # What libraries print must not land in the tables.
    with subprocess.Popen(command, pass_fds=(send,), env=worker_environment(), cwd=ROOT, stdout=sys.stderr) as process:
        os.close(send)
        try:
            with os.fdopen(receive, encoding="utf-8") as stream:
                yield from map(json.loads, stream)
            code = process.wait()
        finally:
            process.kill()
    if code:
        yield {"kind": "died", "text": f"its process ended with {code}; its last words are above"}


def measure_alone(system: str, plan: Plan, folder: Path) -> Row:
    """One case, in a process of its own.

    Raises:
        click.ClickException: it gave no measurement.
    """
    worker = "bench_trl" if system == TRL else "bench_ours"
    messages = list(run_worker(f"tools.benchmarks.{worker}", plan.write(folder / "plan.json")))
    for message in messages:
        if message["kind"] in ("error", "died"):
            raise click.ClickException(f"{system}: {message['text']}")
    row = next(message for message in messages if message["kind"] == "measurement")
    if row["status"] != OK:
        raise click.ClickException(f"{system}: {row['status']}: {row['detail']}")
    return row


def merged(rounds: list[Row]) -> Row:
    """One case: counts of the first round, times of all."""
    times = {key: [second for row in rounds for second in row[key]] for key in ("seconds", "cpu_seconds")}
    return rounds[0] | times


def step_size(plan: Plan, system: str, long_tokens: int) -> tuple[int, float]:
    """Tokens and model FLOPs of one step."""
    # Slow to import; a process measures meanwhile.
    from megatron_solopo.architecture.huggingface_config import read_architecture
    from megatron_solopo.config import parse_config
    from megatron_solopo.data.packing import build_pack
    from megatron_solopo.train.metrics import training_flops

    config = parse_config(plan.config, "benchmark")
    objective = config.objective.model_copy(update={"name": LONG_PO if system == TRL else system})
    # TRL computes the prompt of each answer.
    share_prompts = config.data.share_prompts and system != TRL
    pack = build_pack(plan.batch(long_tokens), objective.roles.all, sequence_multiple=1, share_prompts=share_prompts)
    flops = training_flops(read_architecture(Path(plan.model_path)), [pack], base_learns=config.lora is None)
    return pack.num_tokens, flops


class Results:
    """Collects what the processes report and writes it down after every measurement."""

    def __init__(self, plan: Plan, head: dict[str, Any], json_path: Path | None) -> None:
        self.plan, self.head, self.json_path = plan, head, json_path
        self.rows: list[Row] = []
        self.variants: list[Row] = []
        self.facts: dict[str, str] = {}
        self.failures: list[str] = []
        self._sizes: dict[tuple[str, int], tuple[int, float]] = {}
        self._clock = time.monotonic()

    def take(self, systems: list[str], message: dict[str, Any]) -> None:
        match message.pop("kind"):
            case "facts":
                self.facts[message["name"]] = message["text"]
                click.echo(f"{message['name']}: {message['text']}", err=True)
            case "measurement":
                self.rows.append(self._complete(message))
                self._tell(self.rows[-1], f"[{len(self.rows)}/{len(self.plan.systems) * len(self.plan.long_tokens)}] ")
                self.save()
            case "variant":
                self.variants.append(self._complete(message))
                self._tell(self.variants[-1], "tried ")
            case "error" | "died":
                self.failures.append(f"{' and '.join(systems)}: {message['text']}")

    def _tell(self, row: Row, place: str) -> None:
        now = time.monotonic()
        took, self._clock = now - self._clock, now
        name = " ".join(filter(None, (row["system"], row["variant"])))
        outcome = f"{row['median_seconds']:.3f} s per step" if row["status"] == OK else ""
        click.echo(f"{place}{name} at {row['long_tokens']:,}: {outcome or row['status']} ({took:.0f} s)", err=True)

    def _complete(self, row: Row) -> Row:
        from megatron_solopo.train.metrics import peak_flops  # slow to import; a process measures meanwhile

        return complete(row, *self._size(row["system"], row["long_tokens"]), peak_flops())

    def _size(self, system: str, long_tokens: int) -> tuple[int, float]:
        key = system, long_tokens
        if key not in self._sizes:
            self._sizes[key] = step_size(self.plan, *key)
        return self._sizes[key]

    def save(self) -> None:
        if self.json_path:
            write_json(
                self.json_path,
                self.head
                | {"facts": self.facts, "failures": self.failures, "measurements": self.rows}
                | {"ratios": ratios(self.rows), "first_step": agreement(self.rows), "variants": self.variants},
            )
