#!/usr/bin/env bash
# Submit bases, training, evaluation and export; each starts once the one before has ended well:
#   bash slurm/pipeline.sh --nodes=2 CONFIG [key=value ...]
# Options before CONFIG are sbatch's, for the two jobs with GPUs; but --format=merged exports the merged model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jobs=()
fail() {
  [ ${#jobs[@]} -eq 0 ] || scancel "${jobs[@]}"
  echo "error: $1" >&2
  exit 2
}

gpu_job=() export_as=()
while [[ "${1:-}" == -* ]]; do
  case $1 in
    --format=*) export_as=("$1") ;;
    *) gpu_job+=("$1") ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "no config; bash slurm/pipeline.sh --nodes=2 CONFIG [key=value ...]"
[ -f "$1" ] || fail "$1 is not a file; options of sbatch are written as --name=value, before CONFIG"
cluster=${CLUSTER_ENV:-slurm/cluster.env}
[ -f "$cluster" ] || fail "$cluster is missing; CLUSTER_ENV names the file of cluster facts, without it slurm/cluster.env"
set +u # environment modules read unset variables
source "$cluster"
set -u

for verb in basis train evaluate export; do
  arguments=("$@")
  case $verb in
    basis) options=("${CPU_JOB[@]}") ;;
    export)
      options=("${CPU_JOB[@]}")
      [ "${export_as[*]}" = --format=merged ] || options+=(--nodes=1 --ntasks-per-node=1) # an adapter takes one rank
      arguments+=("${export_as[@]}")
      ;;
    *) options=("${gpu_job[@]}") ;;
  esac
  # A job whose predecessor fails is cancelled, and does not wait for ever.
  [ ${#jobs[@]} -eq 0 ] || options+=("--dependency=afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
  job=$(sbatch --parsable "${options[@]}" "slurm/$verb.sbatch" "${arguments[@]}") ||
    fail "sbatch refused the job for $verb, for the reason above; the jobs before it are cancelled"
  jobs+=("${job%;*}") # a cluster's name may follow
  echo "$verb: job ${jobs[-1]}"
done
