#!/usr/bin/env bash
# Train a small dense model, upcycle it every way, and compare the losses in fp32: scripts/parity.sh [--only WORDS]
# [--write FILE]. Prints one table; exit 1 if an initializer that claims to be exact is not.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
exec python -m moetrain.testing.parity "$@"
