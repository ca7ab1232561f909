"""The SLURM script and the configuration of a planned run: one place for its environment."""

import math
import shlex
from pathlib import Path

from megatron_solopo.config_file import save_config
from megatron_solopo.files import atomic_path
from megatron_solopo.plan.plan import Run
from megatron_solopo.plan.search import Estimate

SBATCH_FILES = ("submit.sbatch", "config.yaml")
_TIME_MARGIN = 1.25
"""Wall clock asked for, over the estimate: checkpoints, evaluation, start, and the estimate's own error."""
_THREADS = 8

_SCRIPT = """\
#!/bin/bash
# Written by `megatron-solopo plan`: {summary}
# Submit it from the directory that the configuration's paths start from, with the Python environment active:
#     sbatch {folder}/submit.sbatch
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus_per_node}
#SBATCH --cpus-per-task={cpus}
#SBATCH --exclusive
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Rendezvous: the first node of the job.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
MASTER_PORT=${{MASTER_PORT:-29500}}

{environment}

# One torchrun per node. A job that was interrupted and queued again continues from its latest checkpoint:
# set checkpoint.save_steps, or there is none before the end.
srun --kill-on-bad-exit=1 torchrun \\
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node {gpus_per_node} \\
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \\
    -m megatron_solopo train --config {config}
"""


def write_sbatch(estimate: Estimate, run: Run, folder: Path) -> None:
    """Write `submit.sbatch` and `config.yaml` of a layout into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(estimate.layout.config, folder / "config.yaml")
    with atomic_path(folder / "submit.sbatch") as temporary:
        temporary.write_text(script(estimate, run, folder), encoding="utf-8")


def script(estimate: Estimate, run: Run, folder: Path) -> str:
    """The batch script, which reads the configuration in `folder`."""
    per_node = min(estimate.gpus, estimate.gpu.gpus_per_node)
    minutes = max(10, math.ceil(run.hours * 60 * _TIME_MARGIN))
    hours, minutes = divmod(minutes, 60)
    return _SCRIPT.format(
        summary=f"{estimate.gpus} x {estimate.gpu.device_name}, {estimate.layout.name}",
        folder=shlex.quote(str(folder)),
        config=shlex.quote(str(folder / "config.yaml")),
        name=shlex.quote(estimate.layout.config.run_dir.name),
        nodes=estimate.gpus // per_node,
        gpus_per_node=per_node,
        cpus=per_node * _THREADS,
        time=f"{hours}:{minutes:02d}:00",
        environment="\n".join(f"export {name}={value}" for name, value in environment(estimate).items()),
    )


def environment(estimate: Estimate) -> dict[str, str]:
    """What NCCL, CUDA and torch read from the environment."""
    parallel = estimate.layout.config.parallel
    values = {
        "OMP_NUM_THREADS": str(_THREADS),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    if parallel.tensor_model_parallel_size * parallel.context_parallel_size > 1:
        # Communication kernels start in the order of issue, which Megatron's overlap under TP and CP counts on.
        values["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return values
