#!/usr/bin/env python3
"""Write every plan of this folder again: text, batch script and configuration, each with its dry run.

    python examples/plans/make_plans.py            # all, some minutes on two cores
    python examples/plans/make_plans.py llama-3.1-8b-64xh100

A model that no layout fits has its reason in the text instead.
"""

import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = ("llama-3.1-8b", "llama-3.1-70b", "qwen2.5-7b", "qwen2.5-72b")
GPUS = (8, 64, 256, 1024)
TYPES = ("h100", "h200")
TOKENS = "short=3584,long=130560,response=512"  # with its answer, the long context makes 131,072 tokens


def cases() -> Iterator[tuple[str, list[str]]]:
    """By name, the arguments of `megatron-solopo plan`, relative to the repository's root."""
    for model in MODELS:
        for gpus in GPUS:
            for gpu in TYPES:
                name = f"{model}-{gpus}x{gpu}"
                folder = (HERE / "launch" / name).relative_to(HERE.parents[1])
                arguments = ["--config", f"examples/plans/{model}.yaml", "--gpus", str(gpus), "--gpu", gpu]
                yield name, ["plan", *arguments, "--tokens", TOKENS, "--dry-run", "--emit-sbatch", str(folder)]


def make(name: str, arguments: list[str]) -> bool:
    """Write one plan; returns whether a layout fits."""
    from megatron_solopo.cli.main import main

    text = StringIO()
    try:
        with redirect_stdout(text), redirect_stderr(text):
            main(arguments)
        fits = True
    except SystemExit:
        fits = False
    file = HERE / "launch" / f"{name}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"$ megatron-solopo {' '.join(arguments)}\n\n{text.getvalue()}", encoding="utf-8")
    return fits


if __name__ == "__main__":
    chosen = sys.argv[1:]
    for name, arguments in cases():
        if not chosen or name in chosen:
            print(name, "fits" if make(name, arguments) else "does not fit", flush=True)
