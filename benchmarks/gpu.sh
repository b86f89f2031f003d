#!/usr/bin/env bash
# Checks and measures the GPU backend on this machine's card; one CSV per part, in
# benchmarks/results/<card>/, every row on disk before the next case begins.
#
#   benchmarks/gpu.sh check     every op against float64 or bit for bit, GPU tests, compute-sanitizer
#   benchmarks/gpu.sh kernels   the card's ceilings, then every op at the bars' shapes
#   benchmarks/gpu.sh block     one 7B block: exact, obs, official, and the authors' algorithm
#   benchmarks/gpu.sh e2e       whole 7B checkpoints from disk to disk
#
# Options go to `python -m benchmarks.gpu` (--help says which), --dry-run for one: tiny sizes, on the
# CPU under Triton's interpreter where there is no card, never into results/. A part ends within
# eight minutes. Needs python >= 3.11, torch >= 2.11 and triton >= 3.6 (PYTHON names another
# interpreter); no network. Nothing is installed: `check` and `e2e` build the C++ extension in place.
# Exit status: 0 every case gave its figure, 1 some did not, 2 usage or no card.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

limit=480
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
case "${1:-}" in
  check | kernels | block | e2e) ;;
  *)
    sed -n '2,/^set /{/^# /p;}' "$0" | cut -c3-
    exit 2
    ;;
esac

# Tools of the driver and of CUDA are not always on the path.
for folder in /usr/local/cuda/bin /usr/local/nvidia/bin; do
  [[ -d $folder ]] && PATH+=":$folder"
done
# Triton keeps what it compiles in the home folder, unless that cannot be written.
if [[ -z "${TRITON_CACHE_DIR:-}" ]] && ! mkdir -p "${TRITON_HOME:-${HOME:-/}}/.triton/cache" 2>/dev/null; then
  TRITON_CACHE_DIR=$(mktemp -d) || exit 2
  export TRITON_CACHE_DIR
  trap 'rm -rf "$TRITON_CACHE_DIR"' EXIT
fi

# Kernels and blocks are held to plain torch on the card: they need no extension.
if [[ $1 =~ ^(check|e2e)$ && " $* " != *" --dry-run "* ]]; then
  if ! log=$("$PYTHON" setup.py -q build_ext --inplace 2>&1); then
    printf '%s\n' "$log" | tail -n 5
    echo "the C++ extension could not be built: going on without native"
  fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
left=$((limit - SECONDS))
# The last cases may run over: half a minute is kept for them before the part is stopped.
timeout --signal=INT --kill-after=10 "$left" \
  "$PYTHON" -m benchmarks.gpu --seconds $((left - 30)) "$@"
