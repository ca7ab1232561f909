"""The SLURM script and the configuration of a planned run. The script reads `launch.sh`, which starts the run."""

import math
import shlex
from pathlib import Path

from megatron_solopo.config import save_config
from megatron_solopo.files import atomic_path
from megatron_solopo.plan.answer import PlannedRun

SBATCH_FILES = ("submit.sbatch", "config.yaml")
_TIME_MARGIN = 1.25
"""Wall clock to ask for, relative to the estimate: for checkpoints, evaluation, start, and the estimate's error."""
_SAVING_MINUTES = 10
"""This long before its time limit, SLURM asks the job to save and to queue again. The limit is extended by it."""
_CPUS_PER_GPU = 8

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

# Settings. Variables in the environment of sbatch replace them. launch.sh explains them and starts the run. A job that
# is interrupted continues from its latest checkpoint: checkpoint.every_minutes sets how old that is at most.
: "${{PYTHON:=python}}" "${{GPUS_PER_NODE:={gpus_per_node}}}" "${{MAX_RESTARTS:=0}}" "${{REQUEUE:=yes}}"
source "$("$PYTHON" -c 'import megatron_solopo.plan as plan; print(plan.__path__[0])')/launch.sh"
launch {config} "$@"
"""


def write_sbatch(run: PlannedRun, folder: Path) -> None:
    """Write `submit.sbatch` and `config.yaml` of a run into a folder. Makes the folder if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(run.layout.config, folder / "config.yaml")
    with atomic_path(folder / "submit.sbatch") as temporary:
        temporary.write_text(_batch_script(run, folder), encoding="utf-8")


def _batch_script(run: PlannedRun, folder: Path) -> str:
    gpu, layout = run.planner.gpu, run.layout
    per_node = min(layout.gpus, gpu.gpus_per_node)
    minutes = max(10, math.ceil(run.hours * 60 * _TIME_MARGIN)) + _SAVING_MINUTES
    hours, minutes = divmod(minutes, 60)
    return _SCRIPT.format(
        summary=f"{layout.gpus} x {gpu.device_name}, {layout.name}",
        folder=shlex.quote(str(folder)),
        config=shlex.quote(str(folder / "config.yaml")),
        name=shlex.quote(layout.config.run_dir.name),
        nodes=layout.gpus // per_node,
        gpus_per_node=per_node,
        cpus=per_node * _CPUS_PER_GPU,
        saving_seconds=_SAVING_MINUTES * 60,
        time=f"{hours}:{minutes:02d}:00",
    )
