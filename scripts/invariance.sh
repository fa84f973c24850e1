#!/usr/bin/env bash
# Train 20 steps under many layouts and compare each with one process; prints one table, exit 1 if any layout differs.
#   scripts/invariance.sh [--device cuda] [--quick] [--only REGEX] [--steps N] [--write FILE [--keep]]
# --device cuda: the layouts that fit on this machine's GPUs, under NCCL. --keep: continue FILE's interrupted table.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
export OMP_NUM_THREADS=1
[[ " $* " == *" --device cuda "* ]] || export CUDA_VISIBLE_DEVICES=""
exec python -m moetrain.testing.invariance "$@"
