#!/usr/bin/env bash
# Downloads the peers as wheels (46 MB, of which bitsandbytes is 43), for a GPU machine that has no network:
#     benchmarks/fetch_peers.sh DIR [PACKAGE...]
#
# For Python 3.12 on x86-64 Linux, without what a machine with transformers, accelerate, peft, pandas and
# pyarrow has: name what is missing there as PACKAGE. Then, there: WHEELS=DIR benchmarks/gpu_all.sh.
# Not among them: quack-kernels, whose nvidia-cutlass-dsl is over 90 MB (PACKAGEs: quack-kernels einops
# apache-tvm-ffi torch-c-dlpack-ext nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-{core,base,cu13}), and pyarrow,
# 50 MB. What cannot be had is told here, and is told as absent beside the numbers.
set -u
DIR=${1:?usage: benchmarks/fetch_peers.sh DIR [PACKAGE...]}
shift
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
PACKAGES=(trl==1.16.0 datasets==5.2.0 "dill<0.4.2" "multiprocess<0.70.20" liger-kernel cut-cross-entropy flash-attn bitsandbytes "$@")
PLATFORMS=()
for version in 2_35 2_34 2_31 2_28 2_27 2_24 2_17 2014 1; do
    PLATFORMS+=(--platform "manylinux${version/#2_/_2_}_x86_64")
done
mkdir -p "$DIR"
missing=()
for package in "${PACKAGES[@]}"; do
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${PLATFORMS[@]}" -d "$DIR" "$package" 2>/dev/null ||
        missing+=("$package")
done
ls -sh "$DIR"
[ ${#missing[@]} -eq 0 ] || echo "no wheel for Python 3.12 on manylinux: ${missing[*]}"
