#!/usr/bin/env bash
# The same start, in the foreground of an allocation, to find out why something does not work:
#     salloc --nodes=2 --gpus-per-node=8 --exclusive --time=1:00:00 \
#         examples/slurm/interactive.sh config.yaml [key=value ...]
# Ctrl-C saves and ends the run. In another terminal, a shell on a node of it (py-spy, nvidia-smi):
#     srun --jobid=ID --overlap --nodes=1 --nodelist=NODE --pty bash

# Settings; the environment goes before them. What they mean: launch.sh.
: "${PYTHON:=python}" "${GPUS_PER_NODE:=8}" "${MAX_RESTARTS:=0}"
REQUEUE=no
# Errors name the line that asked for the kernel, at the price of speed.
export CUDA_LAUNCH_BLOCKING="${CUDA_LAUNCH_BLOCKING:-0}"
# Every collective is checked against the other ranks' before it runs: finds a rank that does something else.
export TORCH_DISTRIBUTED_DEBUG="${TORCH_DISTRIBUTED_DEBUG:-OFF}"

# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
