#!/usr/bin/env python3
"""Measure training steps: `solopo` and `long_po` here, and TRL's DPO trainer on the same weights and the same pairs.

\b
On a GPU:
    python -m tools.benchmarks.benchmark --shape qwen2.5-1.5b --long-tokens 8192 --long-tokens 32768 \\
        --fallback parallel.recompute_granularity=full --json benchmark.json --plot benchmark.png
On a CPU, at toy size:
    python -m tools.benchmarks.benchmark --shape tiny --short-tokens 64 --long-tokens 256 --response-tokens 16

Weights and data are random and the same for all systems. solopo and long_po run in one process, whole optimizer steps
in turn; TRL runs in a process of its own, in every variant that could be its fastest, the reference log-probs
precomputed as ours are. Ours compute a prompt once, TRL for each answer; data.share_prompts=false compares equal work.
Running out of memory is a result: the next --fallback or variant is tried, and if there is none, no longer length. The
learning rate is too small to move a weight, so that every step of every system computes the same thing, and loss and
gradient norm can be compared. OVERRIDES are keys of the training configuration, as `megatron-solopo train` takes them.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
import yaml

from megatron_solopo.config import load_config
from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.errors import UserError
from tools.benchmarks.bench_case import LONG_PO, OURS, SHAPES, SOLOPO, SYSTEMS, TRL, Plan, model_config
from tools.benchmarks.bench_report import Row, markdown, plot
from tools.benchmarks.bench_results import ROOT, Results, measure_alone, run_worker, step_size
from tools.reporting import environment

_PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "transformers", "trl", "accelerate", "liger-kernel"),
    *("flash-attn", "triton"),
)
_NOTES = (
    "Our systems keep fp32 master weights and fp32 Adam moments beside bfloat16 weights, and reduce gradients in fp32; "
    "TRL trains bfloat16 weights with bfloat16 gradients and moments, which is faster and takes less memory.",
    "MFU and TFLOP/s count the model's FLOPs by true lengths (megatron_solopo.train.metrics), neither recomputation "
    "nor padding, against the dense bfloat16 peak; TRL's are those of its pair, which is long_po's.",
    "Step time is forward, backward, gradient norm and optimizer; loading data and logging are not in it.",
)


def training_values(model_path: Path, triplets: int, tokens: int) -> dict[str, Any]:
    """The training configuration before overrides; no data and no run directory are ever touched."""
    return {
        "run_dir": str(model_path / "unused"),
        "model": {"path": str(model_path), "dtype": "float32" if is_cpu() else "bfloat16"},
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
        except UserError as error:
            raise click.UsageError(str(error).replace(f"{file}: ", "")) from None
        if TRL in sizes["systems"] and config.objective.loss_type != "dpo":
            raise click.UsageError(
                f"objective.loss_type={config.objective.loss_type}: TRL is measured with dpo alone; "
                f"leave it out, --systems {','.join(OURS)}"
            )
        configs[fallback or "as given"] = config.model_dump(mode="json")
    return Plan(str(folder), architecture.vocab_size, configs, **sizes)


def measure_case(system: str, shape: str, overrides: Sequence[str], sizes: dict[str, Any]) -> Row:
    """One case in a process of its own, with the tokens and the model's FLOPs of its step."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        plan = make_plan(Path(name), shape, None, overrides, (), systems=[system], **sizes)
        row = measure_alone(system, plan, Path(name))
        tokens, flops = step_size(plan, system, row["long_tokens"])
    return row | {"tokens_per_step": tokens, "flops_per_step": flops}


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


def device_facts() -> dict[str, Any]:
    """GPU, driver and CUDA, asked of nvidia-smi so that this process takes no memory of the device."""
    if is_cpu():
        return {"device": "cpu"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        told = "a CUDA device; nvidia-smi does not answer"
    return {"device": told, "cuda": torch.version.cuda}


def source_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


Command = TypeVar("Command", bound=Callable[..., None])
_FILE = click.Path(path_type=Path, dir_okay=False)


def _count(name: str, default: int, text: str, least: int = 1) -> Callable[[Command], Command]:
    return click.option(name, type=click.IntRange(least), default=default, show_default=True, help=text)


def comparison_options(*, long_tokens: int, response_tokens: int, steps: int) -> Callable[[Command], Command]:
    """The options of the benchmarks that compare a few cases in rounds, with these defaults."""

    def with_options(command: Command) -> Command:
        for option in reversed(
            (
                click.option("--shape", type=click.Choice(list(SHAPES)), default="small", show_default=True),
                _count("--long-tokens", long_tokens, "With the answer.", least=2),
                _count("--response-tokens", response_tokens, "Of each answer."),
                _count("--rounds", 2, "In each of them, all cases run in turn."),
                _count("--steps", steps, "Timed, per round and case."),
                click.option("--without-trl", is_flag=True, help="Measure only this package."),
                click.option("--json", "json_path", type=_FILE, help="Write the results here."),
            )
        ):
            command = option(command)
        return command

    return with_options


def split_systems(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    names = value.split(",")
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise click.BadParameter(f"unknown {', '.join(unknown)}; choose from {','.join(SYSTEMS)}")
    return [name for name in SYSTEMS if name in names]


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="qwen2.5-1.5b", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Layers, where they are not to be the published number.")
@click.option("--systems", callback=split_systems, default=f"{SOLOPO},{LONG_PO},{TRL}", show_default=True)
@click.option("--long-tokens", type=click.IntRange(2), multiple=True, default=(8192, 32768, 131072), show_default=True)
@click.option("--short-tokens", type=click.IntRange(2), default=1024, show_default=True)
@click.option("--response-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of each answer.")
@click.option("--triplets", type=click.IntRange(1), default=1, show_default=True, help="Per step.")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Timed, per system and length.")
@click.option("--warmup", type=click.IntRange(1), default=2, show_default=True, help="Steps before those.")
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
    # Ended in good order, so that no process of ours stays on the GPU.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
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
        # The model's shape too: `megatron-solopo plan --calibration` reads it.
        head |= {
            "configs": plan.configs,
            "notes": _NOTES,
            "architecture": json.loads((folder / "config.json").read_text()),
        }
        results = Results(plan, head, json_path)
        plan_file = plan.write(folder / "plan.json")
        for name, served in (("bench_ours", OURS), ("bench_trl", (TRL,))):
            if systems := [system for system in plan.systems if system in served]:
                for message in run_worker(f"tools.benchmarks.{name}", plan_file):
                    results.take(systems, message)
    results.save()
    if not results.rows:
        raise click.ClickException("; ".join(results.failures))
    head = {key: value for key, value in head.items() if key not in ("sizes", "configs", "notes", "architecture")}
    click.echo("\n".join(f"{key}: {value}" for key, value in (head | results.facts).items()))
    click.echo("\n" + "\n".join(f"- {note}" for note in _NOTES))
    click.echo(f"\n{markdown(results.rows, results.variants)}")
    if plot_path:
        plot(results.rows, plot_path)
    if results.failures:
        raise click.ClickException("; ".join(results.failures))


if __name__ == "__main__":
    main()
