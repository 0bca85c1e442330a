#!/usr/bin/env bash
# All GPU work, in priority order: benchmarks/gpu_all.sh [--dry-run] [STAGE...]
#
# Each stage is independent, takes at most 8 minutes, writes its own JSON under $OUT (default:
# benchmarks/results) and leaves the next one running when it fails. No network is needed.
# Stages: gate (GPU tests), head (the lm_head beside every other one), steps (training steps, each idea
# on and off).
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-benchmarks/results}
DRY=
[ "${1:-}" = --dry-run ] && { DRY=--dry-run; shift; }
STAGES=("$@")
[ ${#STAGES[@]} -eq 0 ] && STAGES=(gate head steps)
failed=()
for stage in "${STAGES[@]}"; do
    echo "== $stage"
    timeout 480 "$PYTHON" -m "benchmarks.gpu_$stage" $DRY --out "$OUT/gpu_$stage.json"
    code=$?
    [ $code -eq 0 ] || { echo "== $stage failed with $code"; failed+=("$stage"); }
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
