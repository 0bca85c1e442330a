#!/usr/bin/env bash
# All GPU work, in priority order: benchmarks/gpu_all.sh [--dry-run] [STAGE...]
#
#   gate       correctness first: GPU tests and the numbers' own check
#   head       the lm_head beside every other one
#   steps      whole training steps beside TRL and plain Hugging Face, and each idea's share
#   dropin     TRL stock and with our patch
#   parity     learning beside TRL: the same losses?
#   memory     the largest pair and model that fit
#   fit        what trains on cards of 12 to 48 GB, beside TRL with the same tricks
#   tricks     what each trick that saves memory costs
#   attention  shared prompts against padded rows
#   growth     tokens, vocabulary, responses, cached pairs
#   tuning     the fastest tile of this chip
#
# Each stage is independent, ends within 8 minutes, writes its own JSON to $OUT (default: benchmarks/results)
# as it goes, reads there what an earlier visit of the day measured (and the gate's verdict),
# and leaves the next one running when it fails. --dry-run runs every stage's code on tiny shapes, on a CPU
# too, into a temporary $OUT. No network is needed: wheels in $WHEELS (default: .whl; fetch_peers.sh makes
# it) are installed for this run alone. $MINUTES: what a stage may take before it begins nothing new (7.5);
# half a minute later it is stopped. $BENCH_COMMIT: the commit, where this copy of the tree has no .git.
set -u
cd "$(dirname "$0")/.."
ALL=(gate head steps dropin parity memory fit tricks attention growth tuning)
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
WHEELS=${WHEELS:-.whl}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
MINUTES=${MINUTES:-7.5}
options=(--minutes "$MINUTES")
limit=$(awk "BEGIN { print int(60 * $MINUTES + 30) }")
if [ "${1:-}" = --dry-run ]; then
    shift
    options+=(--dry-run)
    OUT=${OUT:-$scratch/results}
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU here: --dry-run shows that all of it runs"
    exit 2
fi
OUT=${OUT:-benchmarks/results}
stages=("$@")
[ ${#stages[@]} -eq 0 ] && stages=("${ALL[@]}")
for stage in "${stages[@]}"; do
    [[ " ${ALL[*]} " == *" $stage "* ]] || { echo "no stage $stage; there are: ${ALL[*]}"; exit 2; }
done
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if compgen -G "$WHEELS/*.whl" >/dev/null; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$scratch/site" "$WHEELS"/*.whl || echo "the wheels in $WHEELS do not fit this Python"
    export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi

summary=()
failed=0
for stage in "${stages[@]}"; do
    echo "== $stage"
    begun=$SECONDS
    timeout --kill-after=15 "$limit" "$PYTHON" -m "benchmarks.gpu_$stage" "${options[@]}" --out "$OUT"
    code=$?
    case $code in
    0) how=done ;;
    124 | 137) how="stopped after $limit s" failed=1 ;;
    *) how="failed with $code" failed=1 ;;
    esac
    summary+=("$(printf '%-10s %-22s %4d s' "$stage" "$how" $((SECONDS - begun)))")
done
echo
printf '%s\n' "${summary[@]}"
exit $failed
