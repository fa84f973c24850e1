#!/usr/bin/env bash
# Set up and train: scripts/train.sh [hydra overrides]. One rank per GPU; without GPUs two ranks on the CPU, with the
# experts divided between them. NPROC=n chooses the number of ranks.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
ranks="${NPROC:-$((gpus > 0 ? gpus : 2))}"
cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)))')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"

defaults=()
[[ " $*" == *" experiment="* ]] || defaults+=(experiment=quickstart)
[[ " $*" == *" parallel.ep="* ]] || defaults+=("parallel.ep=$((8 % ranks == 0 ? ranks : 1))")
# The quick start's four sequences a step are too few for more ranks than that.
[[ "$ranks" -le 4 || " $*" == *" experiment="* || " $*" == *" train.global_batch="* ]] || \
  defaults+=("train.global_batch=$ranks")
exec torchrun --standalone --nproc-per-node "$ranks" -m moetrain train "${defaults[@]}" "$@"
