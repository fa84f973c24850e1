#!/usr/bin/env bash
# Set up and run everything CI runs: linters, types, import order, and the tests,
# which also compile every kernel without a GPU.
# Arguments go to pytest: scripts/test.sh -k layout; scripts/test.sh -n0 --pdb tests/unit/moe
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
export OMP_NUM_THREADS=1

if [[ $# -eq 0 ]]; then
  ruff check .
  ruff format --check .
  mypy
  lint-imports
fi

# A worker a core; four at most, because each may have four ranks. Long runs of neighbours stay on one worker and share
# its references.
workers=(-n logical --maxprocesses 4 --dist worksteal)

# Ranks of the CPU tests are forked, which a process that has touched CUDA must not do: on a GPU machine, two runs.
if [[ "$(python -c 'import torch; print(torch.cuda.device_count())')" -gt 0 ]]; then
  CUDA_VISIBLE_DEVICES="" python -m pytest "${workers[@]}" -m "not gpu" "$@"
  exec python -m pytest -m gpu "$@"
fi
exec python -m pytest "${workers[@]}" "$@"
