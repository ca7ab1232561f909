"""Train one run, and export it to a Hugging Face directory."""

from pathlib import Path
from typing import Any

from megatron_solopo.files import read_jsonl, remove
from smollm2.plan import BASE, Run, Sizes
from smollm2.steps import HERE, command, dtype

TRAINING = "training"
"""Where a file of results holds what `train_run` returns."""
CURVES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen_long",
    "solo_ra/gap_abs",
    "nll_loss",
    "grad_norm",
)

RETURNING_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)}
"""glibc returns blocks of 4 MiB and more as soon as they are freed.

Otherwise it keeps them, and the next packs need other sizes. A training grew from 8.2 to 12.8 GiB in 48 steps,
and two of them did not fit in 24 GB. One with long contexts of 4,096 tokens took 12.0 GiB. A step takes about a fourth
longer."""


def model_directory(work: Path, run: Run) -> Path:
    """The Hugging Face directory of what a run trained."""
    return work / "model" if run.method == BASE else work / "exported" / run.name


def answers_directory(work: Path, run: Run) -> Path:
    """Where a run's answers are kept while they are made. They cannot go on in another dtype."""
    return work / "evaluation" / f"{run.name}-{dtype()}"


def takes_much_memory(run: Run) -> bool:
    """Whether two such trainings do not fit in 24 GB as glibc keeps memory."""
    return run.step_factor > 1 or (run.long_tokens or 0) > 2048


def train_run(work: Path, run: Run, sizes: Sizes) -> dict[str, Any]:
    """Train and export; returns tokens, FLOPs, time and curves. The checkpoint is removed, the metrics stay."""
    # A run cannot go on in another dtype.
    run_dir, log = work / "runs" / f"{run.name}-{dtype()}", work / "logs" / f"{run.name}.train.log"
    if not (run_dir / "checkpoints").is_dir():
        # What a finished or an early stopped training left, and answers of its weights.
        remove(run_dir)
        remove(answers_directory(work, run))
    command(
        *("train", "--config", HERE / "config.yaml", f"run_dir={run_dir}", f"model.path={work / 'model'}"),
        *(f"data.path={work / 'prepared' / run.triplets}", f"model.dtype={dtype()}", *run.overrides(sizes)),
        log=log,
        **(RETURNING_MEMORY if takes_much_memory(run) else {}),
    )
    exported, checkpoint = model_directory(work, run), run_dir / "checkpoints" / f"iter_{run.steps(sizes):07}"
    remove(exported)
    command(
        *("convert", "export", "--checkpoint", checkpoint, "--out", exported),
        *("--dtype", "bfloat16", "--verify", "tensors", *(["--merge"] if run.weights == "lora" else [])),
        log=log,
    )
    steps = read_jsonl(run_dir / "metrics.jsonl")
    remove(run_dir / "checkpoints")
    return {
        "rate": run.rate,
        "dtype": dtype(),
        "steps": len(steps),
        "triplets": len(steps) * sizes.batch,
        "tokens": sum(step["num_tokens"] for step in steps),
        "flops": sum(step["flops"] for step in steps),
        "seconds": round(sum(step["step_time"] for step in steps), 1),
        "curves": {name: [round(step[name], 4) for step in steps] for name in CURVES if name in steps[0]},
    }
