#!/usr/bin/env bash
# Downloads the peers, and what the command needs, as wheels, for a GPU machine that has no network:
#     [FOR_PYTHON=3.12] [CUDA=130] benchmarks/gpu/fetch_peers.sh DIR [PACKAGE...]
#
# For one Python on x86-64 Linux, without what a machine with transformers, accelerate, peft, pandas and
# pyarrow has: name what is missing there as PACKAGE. Then, there: WHEELS=DIR benchmarks/gpu_all.sh.
# bitsandbytes, 43 MB, brings a library for each of many CUDAs, ROCms and XPUs: all but the CPU's and the one
# for $CUDA (130 is CUDA 13.0, what torch 2.11.0+cu130 loads) are taken out of its wheel.
# Not among them: quack-kernels, whose nvidia-cutlass-dsl is over 90 MB (PACKAGEs: quack-kernels einops
# apache-tvm-ffi torch-c-dlpack-ext nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-{core,base,cu13}), and pyarrow,
# 50 MB. flash-attn has no wheel for every Python and torch: where it has none that is said here, and told as
# absent beside the numbers. Anything else that cannot be had is an error. Wheels that lie in DIR are removed first.
set -u
DIR=${1:?usage: benchmarks/gpu/fetch_peers.sh DIR [PACKAGE...]}
shift
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
FOR_PYTHON=${FOR_PYTHON:-3.12}
CUDA=${CUDA:-130}
PACKAGES=(trl==1.16.0 datasets==5.2.0 "dill<0.4.2" "multiprocess<0.70.20" xxhash)
PACKAGES+=("cyclopts>=5.5,<6" attrs docstring_parser rich-rst) # fastdpo's own
PACKAGES+=("liger-kernel>=0.8.5,<0.9" cut-cross-entropy==25.1.1 bitsandbytes==0.50.2 flash-attn)
PACKAGES+=(gguf vaderSentiment "$@") # of the stage `learning`
PLATFORMS=()
for version in 2_35 2_34 2_31 2_28 2_27 2_24 2_17 2014 1; do
    PLATFORMS+=(--platform "manylinux${version/#2_/_2_}_x86_64")
done
mkdir -p "$DIR"
rm -f "$DIR"/*.whl
missing=() # of what must not be
flash=
for package in "${PACKAGES[@]}"; do
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version "$FOR_PYTHON" --implementation cp "${PLATFORMS[@]}" -d "$DIR" "$package" 2>/dev/null && continue
    [ "$package" = flash-attn ] && flash=absent || missing+=("$package")
done

# writes a wheel again without the libraries for other devices, and without their lines in its RECORD
"$PYTHON" - "$CUDA" "$DIR"/bitsandbytes-*.whl <<'END' || exit 1
import re
import sys
import zipfile
from pathlib import Path

cuda, *wheels = sys.argv[1:]
for wheel in filter(Path.exists, map(Path, wheels)):
    thin = wheel.with_suffix(".thin")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(thin, "w", zipfile.ZIP_DEFLATED) as new:
        libraries = {name for name in old.namelist() if re.search(r"/libbitsandbytes_\w+\.so$", name)}
        kept = {name for name in libraries if re.search(rf"_(cpu|cuda{cuda})\.so$", name)}
        if not any(name.endswith(f"_cuda{cuda}.so") for name in kept):
            thin.unlink()
            sys.exit(f"{wheel.name} has no library for CUDA={cuda}; it has: {', '.join(sorted(libraries))}")
        out = libraries - kept
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if line.split(",")[0] not in out).encode()
            if entry.filename not in out:
                new.writestr(entry, content, zipfile.ZIP_DEFLATED)
    thin.replace(wheel)
    print(f"{wheel.name}: {len(out)} libraries for other devices taken out")
END
ls -sh "$DIR"
if [ ${#missing[@]} -gt 0 ]; then
    echo "no wheel for Python $FOR_PYTHON on manylinux: ${missing[*]}" >&2
    exit 1
fi
[ -z "$flash" ] || echo "no wheel of flash-attn for Python $FOR_PYTHON: told as absent beside the numbers"
