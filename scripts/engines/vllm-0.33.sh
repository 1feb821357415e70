#!/usr/bin/env bash
# An environment in which vLLM 0.33.0 builds and loads models on a CPU: vllm-0.33.sh VENV. About 4 minutes, 3.5 GB.
#
# The wheel is PyPI's, for CUDA; vLLM takes itself for a build for CPUs by its version, so that is what the installed
# metadata says. Its compiled extension stays unused.
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)" venv="$1"
python3 -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check install)
"${pip[@]}" torch==2.13.0
grep -v -E '^(torch|vllm|pip|setuptools)==' "$here/vllm-0.33.txt" >"$venv/list.txt"
"${pip[@]}" --no-deps -r "$venv/list.txt" 'setuptools<81'
"${pip[@]}" --no-deps vllm==0.33.0
sed -i 's/^Version: 0.33.0$/Version: 0.33.0+cpu/' "$venv"/lib/python3*/site-packages/vllm-0.33.0.dist-info/METADATA
