#!/usr/bin/env bash
# Train on several nodes by DeepSpeed's launcher, over ssh: HOSTFILE=hosts bash launch/multinode.sh CONFIG [key=value ...]
# The hostfile has a line for each node, `node1 slots=8`: its name and its ranks. The repository lies in a folder that all
# nodes share, and ssh reaches each without a password. The ranks meet on the first node, unless MASTER_ADDR is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

[ -n "${HOSTFILE:-}" ] || fail "no HOSTFILE; write a line for each node, as in \`node1 slots=8\`, and name the file"
[ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE is not a file; write a line for each node, as in \`node1 slots=8\`"
command -v pdsh >/dev/null || fail "pdsh is missing, by which DeepSpeed reaches the nodes; install pdsh"
# Before DeepSpeed's launcher, which asks the first node alone, and says so in a traceback.
first=
while read -r node slots _ <&3 || [ -n "$node" ]; do # the last line may lack its end
  [[ "$node" == [!#]* ]] || continue
  [[ "$slots" == slots=[1-9]* ]] || fail "$HOSTFILE: the line of $node gives no ranks; write \`$node slots=8\`"
  ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$node" test -d "$PWD/.venv" 2>/dev/null ||
    fail "$HOSTFILE: $node does not answer to ssh without a password, or has no $PWD/.venv; try \`ssh $node ls $PWD\`"
  first=${first:-$node}
done 3<"$HOSTFILE"
[ -n "$first" ] || fail "$HOSTFILE names no node; write a line for each, as in \`node1 slots=8\`"

# Of the variables, DeepSpeed (0.19.8) takes only some names to the other nodes, and those of this file.
export DS_ENV_FILE=.venv/launch.env
taken='DS_ACCELERATOR|CXX|TORCH_EXTENSIONS_DIR|OMP_NUM_THREADS|HF_HOME|HF_HUB_OFFLINE|GLOO_\w+|NCCL_\w+|DEEPSPEED_TIMEOUT'
env | grep -E "^($taken)=" >"$DS_ENV_FILE" || true
# Those of MLflow it takes all, on a command line that everyone on the nodes can read: not the secrets among them.
for secret in $(compgen -e MLFLOW_ | grep -E '(PASSWORD|PASSWD|TOKEN|SECRET|KEY)$' || true); do
  echo "warning: $secret stays here: the nodes would show it; keep a password in ~/.mlflow/credentials, or sync later" >&2
  unset "$secret"
done
exec deepspeed --hostfile "$HOSTFILE" --force_multi --no_local_rank --venv_script "$PWD/.venv/bin/activate" \
  --master_addr "${MASTER_ADDR:-$first}" --master_port "${MASTER_PORT:-29500}" --module mica_ds "$verb" "$@"
