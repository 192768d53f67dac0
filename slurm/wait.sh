#!/usr/bin/env bash
# Submit a training and wait for its end. In a study of a cluster: `launch: [bash, slurm/wait.sh, --nodes=2]`. From the
# repository's root:
#   source slurm/cluster.env && bash slurm/wait.sh [options of sbatch, as --name=value] CONFIG [key=value ...]
# Where this script is told to end, it cancels the job, and waits until that is over.
set -euo pipefail

job="" options=()
trap '[ -z "$job" ] || scancel "$job"' TERM
while [[ "${1:-}" == -* ]]; do options+=("$1"); shift; done
if ! job=$(sbatch --parsable "${options[@]}" slurm/train.sbatch "$@"); then
  echo "error: sbatch refused the job, for the reason above" >&2
  exit 2
fi
job=${job%;*} # a cluster's name may follow
echo "job $job; output: runs/slurm/$job/"

# Not sbatch --wait, which leaves the job to itself when it is told to end. While SLURM does not answer, a job goes on.
while ! jobs=$(squeue --me --noheader --format=%A) || grep --quiet --line-regexp "$job" <<<"$jobs"; do
  sleep 5 &
  wait $! || true # a signal ends this, not the sleep
done
# What a study will say of it.
sed -n 's/^[0-9]*: error: /error: /p' "runs/slurm/$job"/*.log 2>/dev/null | head -n 1 || true
scontrol --oneliner show job "$job" | grep --quiet JobState=COMPLETED
