#!/usr/bin/env bash
# All GPU work: benchmarks/gpu_all.sh [--dry-run] [visit-1 | ... | visit-6 | STAGE...]
#
# A visit is one command of at most $VISIT_SECONDS (570), on a machine that is borrowed for as long:
#
#   visit-1    the gate with all GPU tests, doctor, the head's first shapes
#   visit-2    steps of Qwen2.5-0.5B in a short field
#   visit-3    the same of Qwen2.5-1.5B; memory
#   visit-4    tuning, dropin, parity
#   visit-5    steps with images
#   visit-6    on-policy rounds
#
# The stages, in priority order (all of them without an argument):
#
#   gate       correctness first: the numbers' own check and GPU tests
#   head       the lm_head beside every other one
#   steps      whole training steps beside TRL and plain Hugging Face, and each idea's share
#   dropin     TRL stock and with our patch
#   parity     learning beside TRL: the same losses?
#   memory     the largest pair and model that fit
#   fit        what trains on cards of 12 to 48 GB, beside TRL with the same tricks
#   tricks     what each trick that saves memory costs
#   attention  shared prompts against padded rows
#   images     whole training steps on prompts with pictures, beside TRL's vision trainer
#   rounds     on-policy rounds: training on sampled groups beside TRL's trainers, and sampling
#   growth     tokens, vocabulary, responses, cached pairs
#   tuning     the fastest tile of this chip
#   learning   what the objectives do to a real assistant: a grid, training by training
#
# Each stage is independent, writes its own JSON to $OUT (default: benchmarks/results) whenever it has measured
# something, goes on there where an earlier run of the day and commit stopped, and leaves the next one running
# when it fails. What is printed goes to $OUT/visit-N.log (stages.log) too. $SEED: a folder with what earlier
# commands of the day brought back; its JSON is copied into $OUT first. --dry-run runs all of the code on tiny
# shapes, on a CPU too, into a temporary $OUT. No network is needed: wheels in $WHEELS (default: .whl;
# fetch_peers.sh makes it) are installed for this run alone. $MINUTES: what a stage by name may take before it
# begins nothing new (7.5); half a minute later it is stopped. $BENCH_COMMIT: the commit, where this copy of the
# tree has no .git. $BENCH_DATE: the day that results are written under, where a visit may cross midnight.
set -u
cd "$(dirname "$0")/.."
ALL=(gate head steps dropin parity memory fit tricks attention images rounds growth tuning learning)
VISITED=(gate head steps memory tuning dropin parity) # with a log 8 files, which is all that may come back
VISIT_SECONDS=${VISIT_SECONDS:-570}                   # from the first line; the plans below are made for 570
LEAST_SECONDS=30                                      # that a stage is begun with
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
WHEELS=${WHEELS:-.whl}
MINUTES=${MINUTES:-7.5}
dry=()
[ "${1:-}" = --dry-run ] && dry=(--dry-run) && shift

# What a visit does: a stage, the most seconds it may take, its options. What it leaves is the next one's.
case ${1:-} in
visit-1) plan=("gate 350" "doctor 110" "head 570") ;;
visit-2) plan=("steps 570 --short Qwen2.5-0.5B") ;;
visit-3) plan=("steps 400 --short Qwen2.5-1.5B" "memory 570") ;;
visit-4) plan=("tuning 120" "dropin 250" "parity 570") ;;
visit-5) plan=("images 570") VISITED=(gate images) ;; # of which no earlier visit measured anything
visit-6) plan=("rounds 570") VISITED=(gate rounds) ;;
*) plan=() ;;
esac
visit=
if [ ${#plan[@]} -gt 0 ]; then
    visit=$1 seeds=("${VISITED[@]}")
    [ $# -eq 1 ] || { echo "$visit is a command of its own: nothing beside it"; exit 2; }
else
    stages=("$@")
    [ ${#stages[@]} -eq 0 ] && stages=("${ALL[@]}")
    seeds=(gate "${stages[@]}")
    for stage in "${stages[@]}"; do
        [[ " ${ALL[*]} " == *" $stage "* ]] || { echo "no stage $stage; there are: visit-1 to visit-6 ${ALL[*]}"; exit 2; }
        plan+=("$stage $(awk "BEGIN { print int(60 * $MINUTES + 30) }")")
    done
fi

export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# the first import of torch reads gigabytes; a date that is none ends here
machine=$(timeout 180 "$PYTHON" -c 'from benchmarks.results import machine, today; today(); print(machine())')
[ -n "$machine" ] || { echo "$PYTHON cannot say which machine this is: see above"; exit 2; }
if [ "$machine" = cpu ] && [ ${#dry[@]} -eq 0 ]; then
    echo "no GPU here: --dry-run shows that all of it runs"
    exit 2
fi
scratch=$(mktemp -d)
[ ${#dry[@]} -gt 0 ] && OUT=${OUT:-$scratch/results}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
exec > >(tee "$OUT/${visit:-stages}.log") 2>&1
tee=$!
trap 'rm -rf "$scratch" "$OUT"/*.part; exec >&- 2>&-; timeout 5 tail --pid=$tee -f /dev/null' EXIT

for stage in ${SEED:+"${seeds[@]}"}; do
    newest=
    [ "$stage" = learning ] && stage=learning_real # as its JSON is called
    for file in "$SEED/${stage}_${machine}"_*.json; do # in the order of their dates
        [ -e "$file" ] && newest=$file
    done
    [ -n "$newest" ] && [ ! -e "$OUT/${newest##*/}" ] && cp "$newest" "$OUT" && echo "from $SEED: ${newest##*/}"
done
if compgen -G "$WHEELS/*.whl" >/dev/null; then
    if ! timeout 180 "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
        --no-compile --target "$scratch/site" "$WHEELS"/*.whl; then
        echo "the wheels in $WHEELS do not fit this Python"
        [[ "$visit" == visit-[23456] ]] && echo "$visit measures nothing without them" && exit 2
    fi
    export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi
if [[ "$visit" == visit-[23456] ]] && ! timeout 180 "$PYTHON" -c 'from trl import DPOTrainer'; then
    echo "$visit measures nothing without TRL: make $WHEELS anew, for this Python (fetch_peers.sh)"
    exit 2
fi
[ -n "$visit" ] && export BENCH_NO_PLOTS=1 # files that may come back are few

# run SECONDS COMMAND...: ends it and all that it started by then, after a word of warning
run() {
    local limit=$1 begun=$SECONDS how
    shift
    timeout --kill-after="${KILL_AFTER:-15}" "$limit" "$@"
    code=$?
    case $code in
    0) how=done ;;
    124 | 137) how="stopped after $limit s" ;;
    *) how="failed with $code" ;;
    esac
    [ $code -eq 0 ] || failed=1
    summary+=("$(printf '%-10s %-22s %4d s' "$stage" "$how" $((SECONDS - begun)))")
}

summary=()
failed=0
for line in "${plan[@]}"; do
    read -r stage seconds options <<<"$line"
    minutes=$MINUTES
    if [ -n "$visit" ]; then
        KILL_AFTER=5
        [ "$stage" = doctor ] || seconds=$((seconds * VISIT_SECONDS / 570))
        left=$((VISIT_SECONDS - SECONDS - KILL_AFTER - 3))
        [ "$seconds" -gt "$left" ] && seconds=$left
        if [ "$seconds" -lt "$LEAST_SECONDS" ]; then
            summary+=("$(printf '%-10s no time' "$stage")") failed=1
            continue
        fi
        # a stage counts from its first line, long after the interpreter's, and may be in the middle of something
        minutes=$(awk "BEGIN { m = ($seconds - 50) / 60; printf \"%.2f\", (m > 0.3 ? m : 0.3) }")
    fi
    echo "== $stage"
    if [ "$stage" = doctor ]; then
        if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("fastdpo.doctor") is None)'; then
            echo "this tree has no fastdpo doctor"
            continue
        fi
        run "$seconds" "$PYTHON" -m fastdpo doctor
        continue
    fi
    # shellcheck disable=SC2086
    run "$seconds" "$PYTHON" -m "benchmarks.gpu.$stage" --minutes "$minutes" "${dry[@]}" --out "$OUT" $options
done
echo
printf '%s\n' "${summary[@]}"
exit $failed
