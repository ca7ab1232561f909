#!/usr/bin/env bash
# A run in links, for clusters with short time limits or without requeueing: LINKS jobs of one name, of which SLURM
# starts one after the other (--dependency=singleton). Each continues where the one before stopped, saved or not; those
# that find the run finished end at once.
#     examples/slurm/chain.sh LINKS SCRIPT config.yaml [key=value ...]
#     SBATCH_TIMELIMIT=4:00:00 examples/slurm/chain.sh 6 examples/slurm/multi-node.sbatch config.yaml
# Options of sbatch go through its environment (SBATCH_TIMELIMIT, SBATCH_PARTITION, SBATCH_ACCOUNT, ...).
set -euo pipefail

links=${1:?how many jobs} script=${2:?the batch script} config=${3:?the configuration}
shift 2

# A name of its own, else unrelated jobs would wait for each other.
name=solopo-$(cksum <<<"$PWD $*" | cut -d ' ' -f 1)
for ((link = 1; link <= links; link++)); do
    # A link that is asked to stop does not queue itself again: the next one is waiting.
    REQUEUE=no sbatch --parsable --dependency=singleton --job-name="$name" "$script" "$@"
done
echo "$links links of $config, named $name; scancel --name=$name ends them all" >&2
