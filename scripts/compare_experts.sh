#!/usr/bin/env bash
# Train the same short run under different overrides on one GPU and print throughput and losses side by side:
#   scripts/compare_experts.sh OUT_DIR "experts=grouped_mm" "experts=triton" "experts=auto router.kernels=triton"
# STEPS, BATCH (sequences of 2048 tokens a step, in micro-batches of 4), and EXPERTS are taken from the environment.
# Installs nothing: the environment must have the project's dependencies, or PYTHONPATH=.:kernels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="$1"
shift
mkdir -p "$out"
steps="${STEPS:-50}" batch="${BATCH:-8}" experts="${EXPERTS:-16}"
status=0

number=0
for overrides in "$@"; do
  number=$((number + 1))
  run="runs/compare-experts/$number"
  rm -rf "$run"
  echo "== $overrides"
  # shellcheck disable=SC2086 # several overrides in one word are meant to be split
  python3 -m moetrain train experiment=first_gpu_run "run.dir=$run" "train.steps=$steps" "train.global_batch=$batch" \
    train.eval_every=0 "model.moe.n_experts=$experts" $overrides >"$out/$number.log" 2>&1 || status=1
  grep -E "^(experts|step 1/)|[Ee]rror" "$out/$number.log" || true
  python3 - "$run/metrics.jsonl" <<'PY' || status=1
import json
import statistics
import sys

rows = [json.loads(line) for line in open(sys.argv[1])]
rows = [row for row in rows if "loss" in row]
speed = statistics.median(row["tokens_per_s"] for row in rows[len(rows) // 5 :])
losses = "  ".join(f"step {row['step']}: {row['loss']:.4f}" for row in rows if row["step"] in (1, 2, 10, 25, 50))
print(f"{speed:,.0f} tokens/s  {losses}")
PY
  rm -rf "$run"
done
exit "$status"
