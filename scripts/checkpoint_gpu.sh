#!/usr/bin/env bash
# What checkpoints cost on a machine with GPUs, and a resume of what all of them saved on half of them, folded otherwise:
#   scripts/checkpoint_gpu.sh OUT_DIR [RUN_DIR] [SECONDS] [overrides]
# Installs nothing: the environment must have the project's dependencies, or PYTHONPATH=.:kernels. CPU ranks do too
# (GPUS=2), with overrides that make the model small.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="$1"
run="${2:-runs/checkpoint-gpu}"
seconds="${3:-100}"
overrides=("${@:4}")
mkdir -p "$out"
rm -rf "$run"
python="${PYTHON:-python3}"
gpus="${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}"
half=$((gpus / 2))

# The same active parameters as the recipe's 64 experts, a quarter of the bytes; few rows a step, so that 50 take seconds.
# A flat learning rate: a schedule would depend on train.steps, which the two runs do not share.
model=(optim.schedule.min_ratio=1.0 model.moe.n_experts=16 train.global_batch=8 "train.micro_batch=$((8 / gpus))"
  train.eval_every=0 checkpoint.keep=1)
launch() { "$python" -m torch.distributed.run --standalone --nproc-per-node "$@"; }

launch "$gpus" -m moetrain.testing.checkpoint_speed "$run" "$out/speed.json" --seconds "$seconds" \
  "${model[@]}" "parallel.ep=$gpus" ${overrides[@]+"${overrides[@]}"}

last="$("$python" -c "import json, sys; print(json.load(open(sys.argv[1]))['after'][-1]['step'])" "$out/speed.json")"
echo "== resumed on $half of $gpus"
launch "$half" -m moetrain train experiment=first_gpu_run "run.dir=$run" "${model[@]}" "train.micro_batch=$((4 / half))" \
  "parallel.ep=$half" ${overrides[@]+"${overrides[@]}"} checkpoint.asynchronous=true "train.steps=$last" \
  >"$out/resume.log" 2>&1 || { tail -20 "$out/resume.log"; exit 1; }
"$python" - "$out/speed.json" "$run/metrics.jsonl" <<'PY'
import json, sys
before = {row["step"]: row for row in json.load(open(sys.argv[1]))["after"]}
after = {row["step"]: row for row in map(json.loads, open(sys.argv[2])) if "loss" in row}
for step, row in before.items():
    print(f"step {step}: loss {row['loss']:.6f} on all, {after[step]['loss']:.6f} on half;",
          f"gradient norm {row['grad_norm']:.4f}, {after[step]['grad_norm']:.4f}")
PY
rm -rf "$run"
