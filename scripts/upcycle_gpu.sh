#!/usr/bin/env bash
# A dense model of the 1B class (Llama-3.2-1B's shape, random weights) becomes 8 experts, then 64 fine-grained ones, each
# trained for 50 steps on one GPU of 140 GB. Usage: scripts/upcycle_gpu.sh OUT_DIR [WORK_DIR]
# WORK_DIR takes 17 GB, /dev/shm if that has room: conversion should not wait for a disk. Installs nothing: the
# environment must have the project's dependencies, or PYTHONPATH=.:kernels. LAYERS and STEPS make it smaller, ONLY=copy
# or ONLY=virtual_group does one of the two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="$1"
free_gb="$(df --output=avail -BG /dev/shm | tail -1 | tr -dc 0-9)"
work="${2:-$([[ "$free_gb" -ge 30 ]] && echo /dev/shm/moetrain-upcycle || echo "${TMPDIR:-/tmp}/moetrain-upcycle")}"
cores="$(python3 -c 'import os; print(len(os.sched_getaffinity(0)))')"
ranks="${RANKS:-$((cores > 8 ? 8 : cores))}"
steps="${STEPS:-50}"
mkdir -p "$out" "$work"
trap 'rm -rf "$work"' EXIT
tool=moetrain.testing.upcycle_gpu

one() { # initializer experts top_k granularity
  rm -rf "$work/moe"
  CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=2 torchrun --standalone --nproc-per-node "$ranks" -m "$tool" \
    convert "$work/dense" "$work/moe" "$@"
  torchrun --standalone --nproc-per-node 1 -m "$tool" train "$work/moe" "$steps" train.precision=bf16 \
    train.global_batch=4 train.micro_batch=2 train.seq_len=2048 data.documents=cross parallel.recompute=full \
    optim.lr=0.0003 data.cache_dir="$work/cache" "${@:5}"
}

{
  date -u +%F
  python3 -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")'
  df -h "$work" | tail -1
  python3 -m "$tool" dense "$work/dense" ${LAYERS:+"$LAYERS"}
  [[ "${ONLY:-}" == copy ]] || one virtual_group 8 2 8
  [[ "${ONLY:-}" == virtual_group ]] || one copy 8 2 1
} 2>&1 | tee "$out/upcycle.txt"
