#!/usr/bin/env bash
# A visit to the GPU machine, without the GPU: [PYTHON=python3.12] benchmarks/gpu/rehearsal.sh
#
#   tests    all that need no GPU
#   compile  every kernel, ahead of time
#   dry_run  every stage of gpu_all.sh, on tiny shapes
#
# with that machine's versions (machine.txt), and with what it has not carried there as wheels
# (fetch_peers.sh). About 25 minutes on two cores. The environment is made by $PYTHON, 3.11 or 3.12, on x86-64
# Linux: 6 GB, in $REHEARSAL (.venv-rehearsal), and kept until one of those two files changes. The last line
# says green, or what was red.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
REHEARSAL=$(realpath -m "${REHEARSAL:-.venv-rehearsal}")
python=$REHEARSAL/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

environment() {
    local made_of=(benchmarks/gpu/machine.txt benchmarks/gpu/fetch_peers.sh) version
    cat "${made_of[@]}" | cmp -s - "$REHEARSAL/made_of" && return
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || return
    [[ $version == 3.1[12] ]] || {
        echo "$PYTHON is Python $version: the rehearsal needs 3.11 or 3.12, as in make gpu-rehearsal PYTHON=python3.12"
        return 1
    }
    rm -rf "$REHEARSAL"
    "$PYTHON" -m venv "$REHEARSAL" &&
        "$python" -m pip install --quiet --disable-pip-version-check -r benchmarks/gpu/machine.txt &&
        FOR_PYTHON=$version PYTHON=$python benchmarks/gpu/fetch_peers.sh "$REHEARSAL/wheels" &&
        "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
            --target "$REHEARSAL/site" "$REHEARSAL"/wheels/*.whl &&
        cat "${made_of[@]}" >"$REHEARSAL/made_of" && return
    rm -rf "$REHEARSAL" # half of one
    return 1
}

tests() {
    PYTHONPATH="$PWD:$PWD/kernels:$REHEARSAL/site" OMP_NUM_THREADS=1 \
        "$python" -m pytest -q -n auto --dist loadfile -m "not gpu and not slow"
}

compile() { # a copy of the tree gets the table
    cp -r benchmarks kernels "$scratch" && cd "$scratch" && PYTHONPATH="$PWD:$PWD/kernels" "$python" -m benchmarks.head.aot
}

dry_run() {
    PYTHON=$python WHEELS=$REHEARSAL/wheels benchmarks/gpu_all.sh --dry-run
}

unset PYTHONPATH OUT
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1
summary=()
red=()
for part in environment tests compile dry_run; do
    echo "== $part"
    begun=$SECONDS
    ("$part") || red+=("$part")
    summary+=("$(printf '%-12s %5d s' "$part" $((SECONDS - begun)))")
    [[ " ${red[*]-} " == *" environment "* ]] && break
done
echo
printf '%s\n' "${summary[@]}"
[ ${#red[@]} -eq 0 ] && echo "green, in $SECONDS s" && exit
echo "red: ${red[*]}"
exit 1
