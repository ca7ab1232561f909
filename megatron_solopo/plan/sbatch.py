"""The SLURM script and the configuration of a planned run. How it starts is in `launch.sh`, as in examples/slurm."""

import math
import shlex
from pathlib import Path

from megatron_solopo.config import save_config
from megatron_solopo.files import atomic_path
from megatron_solopo.plan.answer import PlannedRun
from megatron_solopo.plan.search import LayoutEstimate

SBATCH_FILES = ("submit.sbatch", "config.yaml")
_TIME_MARGIN = 1.25
"""Wall clock asked for, over the estimate: checkpoints, evaluation, start, and the estimate's own error."""
_SAVING_MINUTES = 10
"""Before the time limit, the job is asked to save and to queue again; on top of the wall clock."""
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
#SBATCH --signal=B:USR1@{saving_seconds}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Settings; the environment of sbatch goes before them. launch.sh explains them, and does all the rest. Where a job is
# interrupted, it continues from its latest checkpoint: set checkpoint.save_steps, or there may be none before the end.
: "${{PYTHON:=python}}" "${{GPUS_PER_NODE:={gpus_per_node}}}" "${{MAX_RESTARTS:=0}}" "${{REQUEUE:=yes}}"
source "$("$PYTHON" -c 'import megatron_solopo.plan as plan; print(plan.__path__[0])')/launch.sh"
launch {config} "$@"
"""


def write_sbatch(estimate: LayoutEstimate, run: PlannedRun, folder: Path) -> None:
    """Write `submit.sbatch` and `config.yaml` of a layout into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(estimate.layout.config, folder / "config.yaml")
    with atomic_path(folder / "submit.sbatch") as temporary:
        temporary.write_text(script(estimate, run, folder), encoding="utf-8")


def script(estimate: LayoutEstimate, run: PlannedRun, folder: Path) -> str:
    """The batch script, which reads the configuration in `folder`."""
    per_node = min(estimate.gpus, estimate.gpu.gpus_per_node)
    minutes = max(10, math.ceil(run.hours * 60 * _TIME_MARGIN)) + _SAVING_MINUTES
    hours, minutes = divmod(minutes, 60)
    return _SCRIPT.format(
        summary=f"{estimate.gpus} x {estimate.gpu.device_name}, {estimate.layout.name}",
        folder=shlex.quote(str(folder)),
        config=shlex.quote(str(folder / "config.yaml")),
        name=shlex.quote(estimate.layout.config.run_dir.name),
        nodes=estimate.gpus // per_node,
        gpus_per_node=per_node,
        cpus=per_node * _THREADS,
        saving_seconds=_SAVING_MINUTES * 60,
        time=f"{hours}:{minutes:02d}:00",
    )
