#!/usr/bin/env bash
# Kill a run of 4 CPU ranks with SIGKILL at random moments, resume it, and compare it with an uninterrupted one:
#   scripts/chaos.sh [--rounds 30] [--seed N] [--dir DIR]
# Prints its seed and a summary; exit 1 if anything was lost or is different. Minutes on two cores.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
exec python -m moetrain.testing.chaos "$@"
