#!/usr/bin/env bash
# Submit a training and wait for its end. In a study of a cluster: `launch: [bash, slurm/wait.sh, --nodes=2]`. From the
# repository's root:
#   source slurm/cluster.env && bash slurm/wait.sh [options of sbatch, as --name=value] CONFIG [key=value ...]
# Where this script is told to end, it cancels the job, and waits until that is over.
set -euo pipefail

told=""
trap 'told=1' TERM INT # SLURM's commands below may be told, too, and fail: they are called again
options=()
while [[ "${1:-}" == -* ]]; do options+=("$1"); shift; done
if ! job=$(trap '' TERM INT; sbatch --parsable "${options[@]}" slurm/train.sbatch "$@"); then
  echo "error: sbatch refused the job, for the reason above" >&2
  exit 2
fi
job=${job%;*} # a cluster's name may follow
echo "job $job; output: runs/slurm/$job/"

# Not sbatch --wait, which leaves the job to itself when it is told to end. While SLURM does not answer, a job goes on.
while ! jobs=$(squeue --me --noheader --format=%A) || [[ $'\n'$jobs$'\n' == *$'\n'$job$'\n'* ]]; do
  [ -z "$told" ] || scancel "$job" || true
  sleep 5 &
  wait $! || true # a signal ends this, not the sleep
done

for _ in 1 2 3; do
  about=$(scontrol --oneliner show job "$job") && break
  sleep 5
done
# A study says the last error: of the job's script, or of its ranks, whose lines srun numbers.
log=${about##* StdOut=}
sed -nE 's/^( *[0-9]+: )?error: /error: /p' "${log%% *}" "runs/slurm/$job"/*.log 2>/dev/null | tail -n 1 || true
[[ "$about" == *JobState=COMPLETED* ]]
