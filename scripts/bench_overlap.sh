#!/usr/bin/env bash
# What dispatch costs beside the experts' work, on this host's GPUs: moetrain/testing/overlap.py. --dry-run needs none.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
python="$(command -v python || command -v python3)"
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [[ " $* " == *" --dry-run "* || "$gpus" -lt 2 ]]; then
  exec "$python" -m moetrain.testing.overlap "$@"
fi
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m moetrain.testing.overlap "$@"
