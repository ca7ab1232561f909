#!/usr/bin/env python3
"""Measure training steps: `solopo` and `long_po` here, and TRL's DPO trainer on the same weights and the same pairs.

\b
On a GPU:
    python tools/benchmark.py --shape qwen2.5-1.5b --long-tokens 8192 --long-tokens 32768 \\
        --fallback parallel.recompute_granularity=full --json benchmark.json --plot benchmark.png
On a CPU, at toy size:
    python tools/benchmark.py --shape tiny --short-tokens 64 --long-tokens 256 --response-tokens 16

Weights and data are random and the same for all systems. solopo and long_po run in one process, whole optimizer steps
in turn; TRL runs in a process of its own, in every variant that could be its fastest, the reference log-probs
precomputed as ours are. Running out of memory is a result: the next --fallback or variant is tried, and if there is
none, no longer length. The learning rate is too
small to move a weight, so that every step of every system computes the same thing and loss and gradient norm can be
compared. OVERRIDES are keys of the training configuration, as `megatron-solopo train` takes them.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from bench_case import LONG_PO, OK, OURS, SHAPES, SYSTEMS, TRL, Plan, model_config
from bench_report import Row, agreement, complete, markdown, plot, ratios
from reporting import environment

from megatron_solopo.config_file import load_config
from megatron_solopo.files import write_json

warnings.filterwarnings("ignore", module=r"megatron\.core")  # of what is not installed here
_TOOLS = Path(__file__).resolve().parent
_PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "transformers", "trl", "accelerate", "liger-kernel"),
    *("flash-attn", "triton"),
)
_NOTES = (
    "Our systems keep fp32 master weights and fp32 Adam moments beside bfloat16 weights, and reduce gradients in fp32; "
    "TRL trains bfloat16 weights with bfloat16 gradients and moments, which is faster and takes less memory.",
    "MFU and TFLOP/s count the model's FLOPs by true lengths (megatron_solopo.train.cost), neither recomputation nor "
    "padding, against the dense bfloat16 peak; TRL's are those of its pair, which is long_po's.",
    "Step time is forward, backward, gradient norm and optimizer; loading data and logging are not in it.",
)


def on_gpu() -> bool:
    return os.environ.get("MEGATRON_SOLOPO_DEVICE") != "cpu" and torch.cuda.is_available()


def training_values(model_path: Path, triplets: int, tokens: int) -> dict[str, Any]:
    """The training configuration before overrides; no data and no run directory are ever touched."""
    return {
        "run_dir": str(model_path / "unused"),
        "model": {"path": str(model_path), "dtype": "bfloat16" if on_gpu() else "float32"},
        "data": {"path": str(model_path / "unused"), "max_tokens_per_pack": tokens},
        "training": {"global_batch_size": triplets, "max_steps": 1},
        "optimizer": {"lr": 1e-12, "lr_decay_style": "constant"},
    }


def make_plan(
    folder: Path, shape: str, layers: int | None, overrides: Sequence[str], fallbacks: Sequence[str], **sizes: Any
) -> Plan:
    """Write the model's config.json and check everything that can be checked before a process starts."""
    longest = max(sizes["long_tokens"])
    architecture = model_config(shape, layers, longest)
    architecture.save_pretrained(folder)
    file = folder / "benchmark.yaml"
    tokens = 2 * (longest + sizes["short_tokens"])
    file.write_text(yaml.safe_dump(training_values(folder, sizes["triplets"], tokens)), encoding="utf-8")
    configs: dict[str, dict[str, Any]] = {}
    for fallback in ("", *fallbacks):
        try:
            config = load_config(file, (*overrides, *fallback.split()))
        except ValueError as error:
            raise click.UsageError(str(error).replace(f"{file}: ", "")) from None
        configs[fallback or "as given"] = config.model_dump(mode="json")
    return Plan(str(folder), architecture.vocab_size, configs, **sizes)


def check(systems: Sequence[str], short: int, long: Sequence[int], response: int) -> None:
    """Raise click.UsageError for what cannot be measured here."""
    for length in long:
        if not response < short <= length:
            raise click.UsageError(
                f"--long-tokens {length}: needs --response-tokens ({response}) < --short-tokens ({short}) <= it"
            )
    if TRL in systems and importlib.util.find_spec("trl") is None:
        raise click.UsageError(
            f"TRL is not installed; pip install 'megatron-solopo[bench]', or leave it out: --systems {','.join(OURS)}"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError("start it as one process, without torchrun: it measures one device")


def worker_environment() -> dict[str, str]:
    """No trace of a launcher, nothing from the network, and an allocator that does not fragment."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = {name: value for name, value in os.environ.items() if name not in launcher}
    defaults = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # its name before torch 2.9
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "KINETO_LOG_LEVEL": "99",
    }
    hidden = {} if on_gpu() else {"CUDA_VISIBLE_DEVICES": ""}
    return defaults | values | hidden


def run_worker(script: str, plan_file: Path) -> Iterator[dict[str, Any]]:
    """Start a process and yield what it reports; the last message says so if it did not end well."""
    receive, send = os.pipe()
    command = [sys.executable, str(_TOOLS / script), str(plan_file), str(send)]
    # What libraries print must not land in the tables.
    with subprocess.Popen(command, pass_fds=(send,), env=worker_environment(), stdout=sys.stderr) as process:
        os.close(send)
        try:
            with os.fdopen(receive, encoding="utf-8") as stream:
                yield from map(json.loads, stream)
            code = process.wait()
        finally:
            process.kill()
    if code:
        yield {"kind": "died", "text": f"its process ended with {code}; its last words are above"}


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
        from megatron_solopo.train.cost import peak_flops  # slow to import; a process measures meanwhile

        return complete(row, *self._size(row["system"], row["long_tokens"]), peak_flops())

    def _size(self, system: str, long_tokens: int) -> tuple[int, float]:
        """Tokens and model FLOPs of one step."""
        from megatron_solopo.config_file import parse_config
        from megatron_solopo.data.packing import build_pack
        from megatron_solopo.model.architecture import read_architecture
        from megatron_solopo.objective import required_roles
        from megatron_solopo.train.cost import training_flops

        key = (LONG_PO if system == TRL else system, long_tokens)
        if key not in self._sizes:
            objective = parse_config(self.plan.config, "benchmark").objective.model_copy(update={"name": key[0]})
            pack = build_pack(self.plan.batch(long_tokens), required_roles(objective), sequence_multiple=1)
            self._sizes[key] = pack.num_tokens, training_flops(read_architecture(Path(self.plan.model_path)), [pack])
        return self._sizes[key]

    def save(self) -> None:
        if self.json_path:
            write_json(
                self.json_path,
                self.head
                | {"facts": self.facts, "notes": _NOTES, "failures": self.failures, "measurements": self.rows}
                | {"ratios": ratios(self.rows), "first_step": agreement(self.rows), "variants": self.variants},
            )


def device_facts() -> dict[str, Any]:
    """GPU, driver and CUDA, asked of nvidia-smi so that this process takes no memory of the device."""
    if not on_gpu():
        return {"device": "cpu"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        told = "a CUDA device; nvidia-smi does not answer"
    return {"device": told, "cuda": torch.version.cuda}


def source_commit() -> str:
    command = ["git", "-C", str(_TOOLS), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def split_systems(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    names = value.split(",")
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise click.BadParameter(f"unknown {', '.join(unknown)}; choose from {','.join(SYSTEMS)}")
    return [name for name in SYSTEMS if name in names]


@click.command(help=__doc__, context_settings={"ignore_unknown_options": False})
@click.option("--shape", type=click.Choice(list(SHAPES)), default="qwen2.5-1.5b", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Layers, where they are not to be the published number.")
@click.option("--systems", callback=split_systems, default=",".join(SYSTEMS), show_default=True)
@click.option("--long-tokens", type=click.IntRange(2), multiple=True, default=(8192, 32768, 131072), show_default=True)
@click.option("--short-tokens", type=click.IntRange(2), default=1024, show_default=True)
@click.option("--response-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of each answer.")
@click.option("--triplets", type=click.IntRange(1), default=1, show_default=True, help="Per step.")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Timed, per system and length.")
@click.option("--warmup", type=click.IntRange(2), default=2, show_default=True, help="Steps before those.")
@click.option(
    "--fallback",
    "fallbacks",
    multiple=True,
    metavar="OVERRIDES",
    help="Overrides to add for our systems, from the length on at which one of them runs out of memory.",
)
@click.option("--trl-variant", "trl_variants", multiple=True, help="Only these, for example sdpa+liger.")
@click.option("--every-variant", is_flag=True, help="Measure every TRL variant at every length.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path, dir_okay=False), help="Draw them into this PNG.")
@click.option("--profile", type=click.Path(path_type=Path, file_okay=False), help="Write traces of single steps here.")
@click.option("--commit", help="The sources' commit, where this is no git checkout.")
@click.argument("overrides", nargs=-1)
def main(
    shape: str,
    layers: int | None,
    json_path: Path | None,
    plot_path: Path | None,
    profile: Path | None,
    commit: str | None,
    overrides: tuple[str, ...],
    fallbacks: tuple[str, ...],
    **sizes: Any,
) -> None:
    check(sizes["systems"], sizes["short_tokens"], sizes["long_tokens"], sizes["response_tokens"])
    sizes["long_tokens"] = sorted(set(sizes["long_tokens"]))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        where = str(profile.absolute()) if profile else None
        plan = make_plan(folder, shape, layers, overrides, fallbacks, profile=where, **sizes)
        number = layers or SHAPES[shape]["num_hidden_layers"]
        model = f"{shape}, {number} of {SHAPES[shape]['num_hidden_layers']} layers, random weights"
        head = {"model": model, **device_facts(), **environment(_PACKAGES), "commit": commit or source_commit()}
        head["sizes"] = {key: value for key, value in vars(plan).items() if key not in ("configs", "model_path")}
        head["configs"] = plan.configs
        results = Results(plan, head, json_path)
        plan_file = plan.write(folder / "plan.json")
        for script, served in (("bench_ours.py", OURS), ("bench_trl.py", (TRL,))):
            if systems := [system for system in plan.systems if system in served]:
                for message in run_worker(script, plan_file):
                    results.take(systems, message)
    results.save()
    if not results.rows:
        raise click.ClickException("; ".join(results.failures))
    head = {key: value for key, value in head.items() if key not in ("sizes", "configs")}
    click.echo("\n".join(f"{key}: {value}" for key, value in (head | results.facts).items()))
    click.echo("\n" + "\n".join(f"- {note}" for note in _NOTES))
    click.echo(f"\n{markdown(results.rows, results.variants)}")
    if plot_path:
        plot(results.rows, plot_path)
    if results.failures:
        raise click.ClickException("; ".join(results.failures))


if __name__ == "__main__":
    main()
