#!/usr/bin/env bash
# Train 20 steps under many layouts on CPU ranks and compare each with one process: scripts/invariance.sh [--quick]
# [--only WORDS] [--write docs/invariance.md]. Prints one table; exit 1 if any layout differs.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
exec python -m moetrain.testing.invariance "$@"
