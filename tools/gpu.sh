#!/usr/bin/env bash
# What a CUDA machine is asked for, with the Python that is there, no network and no installation:
#   bash tools/gpu.sh [--quick] [--only tests,bench] OUT
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
