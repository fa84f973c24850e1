#!/usr/bin/env bash
# What CI cannot run, on a machine with GPUs: the gpu tests, then 50 steps of the quick start and of a model with 0.3B
# active parameters, on one GPU and on all. Usage: scripts/gpu_check.sh OUT_DIR [RUN_DIR]
# Installs nothing: the environment must have the project's dependencies, or PYTHONPATH=.:kernels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="$1"
runs="${2:-runs/gpu-check}"
mkdir -p "$out"
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
status=0

python -m moetrain doctor | tee "$out/doctor.txt"
python -m pytest -m gpu tests/gpu/test_*.py tests/unit/model tests/unit/test_loss.py tests/distributed/checkpoint \
  tests/distributed/optim -q -rP 2>&1 | tee "$out/pytest.txt" | grep -E "Difference|passed|failed|Error" || true
grep -qE "(failed|error)" "$out/pytest.txt" && status=1

train() { # ranks experiment overrides...
  local ranks="$1" experiment="$2"
  shift 2
  local run="$runs/$experiment-$ranks"
  rm -rf "$run"
  echo "== $experiment on $ranks GPU(s)"
  torchrun --standalone --nproc-per-node "$ranks" -m moetrain train "experiment=$experiment" "run.dir=$run" \
    train.steps=50 "$@" >"$out/$experiment-$ranks.log" 2>&1 || status=1
  grep -E "^step (0|1|10|20|30|40|50)/|[Ee]rror" "$out/$experiment-$ranks.log" || true
  cp "$run/metrics.jsonl" "$out/$experiment-$ranks.jsonl" || status=1
  python -m moetrain report "$run" || status=1
  rm -rf "$run"
}

fewer=(model.moe.n_experts=16) # the same active parameters, a quarter of the checkpoint
export CUDA_VISIBLE_DEVICES=0
train 1 quickstart
train 1 first_gpu_run "${fewer[@]}"
unset CUDA_VISIBLE_DEVICES
if [[ "$gpus" -gt 1 ]]; then
  train "$gpus" quickstart "parallel.ep=$gpus"
  train "$gpus" first_gpu_run "parallel.ep=$gpus" "${fewer[@]}"
fi
exit "$status"
