# What the launchers share; sourced by them in the repository's root, with their arguments. All run the verb `train`,
# unless VERB names another: VERB=doctor bash launch/train.sh CONFIG
fail() { echo "error: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "no config; bash $0 CONFIG [key=value ...]"
[ -d .venv ] || fail "no .venv; run bash launch/setup.sh first"
gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | wc -l) || gpus=0
if [ "${DS_ACCELERATOR:-}" = cpu ]; then gpus=0; fi
# CUDA_VISIBLE_DEVICES leaves some of them to others; -1 leaves all.
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=$(grep -o '[^,]*' <<<"${CUDA_VISIBLE_DEVICES#-1}" | wc -l) || gpus=0
fi
verb=${VERB:-train} ranks=${NUM_RANKS:-$gpus}
if [ "$ranks" -eq 0 ]; then ranks=2; fi

export PATH="$PWD/.venv/bin:$PATH"
