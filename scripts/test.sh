#!/usr/bin/env bash
# Set up and run everything CI runs: linters, types, import order, kernels compiled without a GPU, and the tests.
# Arguments go to pytest: scripts/test.sh -k layout
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
export OMP_NUM_THREADS=1

if [[ $# -eq 0 ]]; then
  ruff check .
  ruff format --check .
  mypy
  lint-imports
  python -m moetrain_kernels.compile_check --arch 90 80
fi
exec python -m pytest "$@"
