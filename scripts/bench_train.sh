#!/usr/bin/env bash
# Training throughput of whole models on all GPUs beside transformers + FSDP2 and, where megatron-core 0.16.1 is
# installed, Megatron-Core, in one run: scripts/bench_train.sh
# [--dry-run] [--gpus N] [--steps 12] [--natural-steps 500] [--only WORDS]. The table goes to stdout, where each of our
# steps' time went to stderr. Installs nothing: the environment must have the project's [dev] dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec python -m moetrain.testing.bench_train "$@"
