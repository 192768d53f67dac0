# What the jobs of this folder share; they source it in the repository's root, and their arguments are at hand here.
fail() { echo "error: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "no config; sbatch [options] slurm/<verb>.sbatch CONFIG [key=value ...]"
cluster=${CLUSTER_ENV:-slurm/cluster.env}
[ -f "$cluster" ] || fail "$cluster is missing; CLUSTER_ENV names the file of cluster facts, without it slurm/cluster.env"
set +u # environment modules read unset variables
source "$cluster"
set -u

job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  # As in sbatch's own names of files. The config is not read here: without a %a its folder would be that of all.
  [[ "$1" == *%a* ]] || printf '%s\n' "$@" | grep -q '^output_dir=.*%a' ||
    fail "the jobs of an array would share a run folder; write %a, their number, in output_dir=... or in CONFIG's name"
  set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the last one's own number stands for all of them
fi

# One a GPU: of those asked for, since --exclusive gives a job all that its nodes have.
ranks=${SLURM_GPUS_PER_NODE:-0}
ranks=${ranks##*:}
[ "$ranks" -gt 0 ] || ranks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
if [ "${SLURM_GPUS_PER_NODE:-}" = 0 ]; then export DS_ACCELERATOR=cpu; fi # not every site hides GPUs that nobody asked for
[ -n "$ranks" ] || fail "no GPUs allocated; source slurm/cluster.env before sbatch, or give it --ntasks-per-node"
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # jobs that share a node differ; below the ports that Linux hands out
export MASTER_ADDR MASTER_PORT

nodes_answer() {
  timeout 300 srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true
}

# Run a verb on all ranks to the job's end: run VERB CONFIG [key=value ...]
run() {
  local code=0 logs=runs/slurm/$SLURM_JOB_ID
  mkdir -p "$logs"
  echo "$SLURM_NNODES nodes x $ranks ranks; output: $logs/"

  # Every rank sees all GPUs of its node and takes the one of its local rank, so no --gpus-per-task; and all cores, of
  # which it takes its part. Blocks keep the ranks of a node together, as hierarchical partitioning expects. What this
  # script exports is for the ranks, also where sbatch was told --export=NONE.
  srun --ntasks=$((SLURM_NNODES * ranks)) --ntasks-per-node="$ranks" --distribution=block --cpu-bind=none --export=ALL \
    --kill-on-bad-exit=1 --label --output="$logs/%n-%N.log" --open-mode=append \
    "${CONTAINER[@]}" .venv/bin/python -m mica_ds "$@" || code=$?

  # 75: stopped by a signal, with a checkpoint. After any failure the nodes are asked: the ranks see that one is lost
  # before SLURM does, which would requeue the job, were it not over by then.
  case $code in
    0) ;;
    75) scontrol requeue "$job" ;;
    *) nodes_answer || scontrol requeue "$job" ;;
  esac
  exit "$code"
}
