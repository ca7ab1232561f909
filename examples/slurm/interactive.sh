#!/usr/bin/env bash
# The same start, in the foreground of an allocation, to find out why something does not work:
#     salloc --nodes=2 --gpus-per-node=8 --exclusive --time=1:00:00 \
#         examples/slurm/interactive.sh config.yaml [key=value ...]
# Ctrl-C saves and ends the run. In another terminal, a shell on a node of it (py-spy, nvidia-smi):
#     srun --jobid=ID --overlap --nodes=1 --nodelist=NODE --pty bash
# CUDA_LAUNCH_BLOCKING=1 makes an error name the line that asked for the kernel; TORCH_DISTRIBUTED_DEBUG=DETAIL checks
# every collective against the other ranks' before it runs. Both are slow.

# Settings; the environment goes before them. What they mean: launch.sh.
: "${PYTHON:=python}" "${GPUS_PER_NODE:=8}" "${MAX_RESTARTS:=0}" "${REQUEUE:=no}"

# shellcheck source=examples/slurm/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
