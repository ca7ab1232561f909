# shellcheck shell=bash
# Starts a run inside a SLURM job, on all its nodes, and decides what becomes of the job when the run ends.
#
#     launch CONFIG [key=value ...]       the arguments of `megatron-solopo train --config`
#
# Read by (`source`) or written into batch scripts. Settings, as variables of the script or of sbatch's environment:
#   PYTHON           the interpreter that has megatron-solopo, as the nodes (or the container) see it
#   GPUS_PER_NODE    ranks per node
#   MAX_RESTARTS     how often ranks that died are started again in place, without leaving the nodes; 0: never
#   REQUEUE          yes: a job that is asked to stop saves and queues again; no: it saves and ends (chains, debugging)
#   SRUN_OPTIONS     array: more options of srun (pyxis: --container-image=...)
#   CONTAINER        array: a command before PYTHON (apptainer exec ...)
set -uo pipefail

launch() {
    : "${PYTHON:=python}" "${GPUS_PER_NODE:?ranks per node}" "${MAX_RESTARTS:=0}" "${REQUEUE:=yes}"

    # --- Environment. What is set outside stays. -------------------------------------------------------------------
    # Ranks meet at the job's first node. The port follows from the job, so that two jobs on one node do not meet.
    local master_addr master_port
    master_addr=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    master_port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    # CPU threads of each rank. Unset, torchrun takes 1; more than cores / ranks makes them fight.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
    # NCCL says what is wrong, and no more. INFO shows which network it took.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    # An NCCL error or timeout ends the rank instead of leaving it in the collective for ever.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
    # The program sets PYTORCH_CUDA_ALLOC_CONF (segments that grow) and, where TP or CP need it,
    # CUDA_DEVICE_MAX_CONNECTIONS=1. What is set outside stays.
    # NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (ib0, eth0, ...): set both where a node has several networks and the
    # wrong one is taken: "connection refused" or "timed out" at the start.
    # Every rank is connected to every other one: 1,024 open files, the usual soft limit, are too few for 1,024 ranks.
    ulimit -S -n "$(ulimit -H -n)" || true
    # Lines reach the log when they are written, and a crash in native code leaves a Python stack.
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

    # --- Start: one launcher per node, which starts that node's ranks. ------------------------------------------------
    local command=(
        "$PYTHON" -m megatron_solopo.launch
        --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "$MAX_RESTARTS"
        --rdzv-backend c10d --rdzv-endpoint "$master_addr:$master_port"
        # A job that was queued again must not meet what is left of its former self.
        --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
        -m megatron_solopo train --config "$@"
    )
    local options=(
        --ntasks-per-node=1
        # All of the node's cores: srun does not take them over from sbatch, and one task would get one core.
        # salloc has no SLURM_CPUS_ON_NODE; this one reads 96(x2), or 96,48.
        --cpus-per-task="${SLURM_JOB_CPUS_PER_NODE%%[(,]*}"
        # Launchers that stop together do not end in the same instant: the first one's end is not the others' yet.
        --kill-on-bad-exit=0 --wait=120
    )
    # In the background: bash runs its traps only while it waits.
    srun "${options[@]}" ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} ${CONTAINER[@]+"${CONTAINER[@]}"} "${command[@]}" &
    local step=$! code asked=

    # --- Stop: --signal=B:USR1@SECONDS, preemption, scancel --batch --signal=USR1, Ctrl-C under salloc. ---------------
    # SIGTERM to srun would kill the ranks hard. scancel reaches every process of the step; they agree, save, exit 85.
    # SIGTERM comes to the ranks from SLURM itself: passed on as well, it could seem a second request, to exit at once.
    trap 'asked=yes; echo "asked to stop: saving"; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 INT
    trap 'asked=yes; echo "asked to stop: saving"' TERM
    while true; do
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break # else it was a trap that ended the wait
    done
    trap - USR1 TERM INT

    # --- What becomes of the job. -------------------------------------------------------------------------------------
    if ((code == 0)); then
        exit 0
    elif ((code == 85)) || [[ $asked ]]; then
        # 85: all is saved. Anything else after a request: it did not come to that, and the last checkpoint counts.
        [[ $REQUEUE == yes ]] || exit $((code == 85 ? 0 : code))
        queue_again
    elif ! timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true; then
        # The other nodes' ranks feel a dead node long before SLURM does (SlurmdTimeout). It then queues the job again
        # itself, but only if the job still runs; by hand it would come back to the dead node.
        echo "a node does not answer: waiting until SLURM has noticed"
        sleep $((2 * $(scontrol show config | awk '$1 == "SlurmdTimeout" { print $3 }')))
        [[ $REQUEUE == yes ]] && queue_again
    fi
    exit "$code"
}

queue_again() {
    # A job that was cancelled, or is over its time limit, is on its way out: it saved, and that was all.
    [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]] || exit 85
    echo "queued again; the same run directory continues"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this script
    echo "SLURM does not requeue this job: submit it again to continue" >&2
    exit 85
}
