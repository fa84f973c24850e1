#!/usr/bin/env bash
# Train a dense model, upcycle it three ways on two CPU ranks, and train parent and children on for as many steps:
# scripts/upcycle_runs.sh [--seeds 0 1 2] [--write FILE]. Prints held-out losses; exit 1 if a child ends above the parent.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
exec python -m moetrain.testing.upcycle_run "$@"
