#!/usr/bin/env python3
"""Write plans into examples/plans/launch: text, batch script and configuration, each with its dry run.

    python examples/plans/make_plans.py                          # the seven that the repository keeps
    python examples/plans/make_plans.py llama-3.1-8b-64xh200     # any model, number and type of GPUs listed below
    python examples/plans/make_plans.py all                      # all 49; takes some minutes on two cores

Where no layout fits, the text holds the reason, and there is no batch script.
"""

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent / "launch"
ROOT = LAUNCH.parents[2]
MODELS = ("llama-3.1-8b", "llama-3.1-70b", "qwen2.5-7b", "qwen2.5-72b", "qwen3-30b-a3b", "qwen3-235b-a22b")
GPUS = (8, 64, 256, 1024)
TYPES = ("h100", "h200")
ADAPTERS = "llama-3.1-70b-lora-8xh200"
"""Adapters of a 70B model on one node, beside training of the whole model."""
KEPT = (
    "llama-3.1-8b-8xh100",
    "llama-3.1-70b-1024xh100",
    ADAPTERS,
    "qwen3-30b-a3b-8xh200",
    "qwen3-30b-a3b-64xh100",
    "qwen3-235b-a22b-256xh100",
    "qwen3-235b-a22b-1024xh100",
)
TOKENS = "short=3584,long=130560,response=512"  # the long context and its answer have 131,072 tokens together


def plan_arguments() -> dict[str, list[str]]:
    """The arguments of `megatron-solopo plan` for each plan, by the plan's name; start it in the repository's root."""
    found = {
        f"{model}-{gpus}x{gpu}": [
            *("plan", "--config", f"examples/plans/{model}.yaml"),
            *("--gpus", str(gpus), "--gpu", gpu, "--tokens", TOKENS),
        ]
        for model in MODELS
        for gpus in GPUS
        for gpu in TYPES
    }
    compared = ["lora.rank=16", "--vary", "recompute,offload,cp_comm,share_prompts,lora"]
    return found | {ADAPTERS: [*found["llama-3.1-70b-8xh200"], *compared]}


def write_plan(name: str, arguments: list[str]) -> bool:
    """Write one plan. Returns whether a layout fits."""
    from megatron_solopo.cli.main import main

    arguments = [*arguments, "--dry-run", "--emit-sbatch", str((LAUNCH / name).relative_to(ROOT))]
    text, errors = StringIO(), StringIO()  # a dry run may warn among the errors
    try:
        with redirect_stdout(text), redirect_stderr(errors):
            main(arguments)
        fits = True
    except SystemExit:
        fits = False
    LAUNCH.mkdir(exist_ok=True)
    answer = text.getvalue() if fits else text.getvalue() + errors.getvalue()
    (LAUNCH / f"{name}.txt").write_text(f"$ megatron-solopo {' '.join(arguments)}\n\n{answer}", encoding="utf-8")
    return fits


if __name__ == "__main__":
    plans = plan_arguments()
    names = list(plans) if sys.argv[1:] == ["all"] else sys.argv[1:] or KEPT
    if unknown := set(names) - set(plans):
        sys.exit(f"error: no plan is called {', '.join(sorted(unknown))}; choose from: {' '.join(plans)}")
    for name in names:
        print(name, "fits" if write_plan(name, plans[name]) else "does not fit", flush=True)
