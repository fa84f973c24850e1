#!/usr/bin/env bash
# One node's share of a run: start it once on every node, with the same arguments.
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=node-a:29500 launch/torchrun.sh experiment=quickstart parallel.ep=8
# NNODES         nodes, or min:max for an elastic run (default 1)
# NPROC          processes on this node: a number, or gpu for one per GPU (default gpu)
# NODE_RANK      0 on the node of RDZV_ENDPOINT, which hosts the rendezvous; anything else elsewhere (default 0)
# RDZV_ENDPOINT  host:port that all nodes reach (default localhost:29500, required with more than one node)
# RDZV_ID        one name for the whole run (default moetrain)
# MAX_RESTARTS   restarts after a failure, each resuming from the newest checkpoint (default 3)
# LOCAL_ADDR     this node's address for the others, where its host name does not resolve
# GRACE          seconds between SIGTERM and SIGKILL, for the final checkpoint (default 300)
# PYTHON         interpreter (default python);  MODULE  what to run (default moetrain)
set -euo pipefail

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
if [[ $NNODES != 1 && -z ${RDZV_ENDPOINT:-} ]]; then
  echo "launch/torchrun.sh: NNODES=$NNODES needs RDZV_ENDPOINT=host:port of the node with NODE_RANK=0" >&2
  exit 2
fi

is_host=false
[[ $NODE_RANK == 0 ]] && is_host=true

options=(
  --nnodes "$NNODES"
  --nproc-per-node "${NPROC:-gpu}"
  --max-restarts "${MAX_RESTARTS:-3}"
  --rdzv-backend c10d
  --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:29500}"
  --rdzv-id "${RDZV_ID:-moetrain}"
  --rdzv-conf "is_host=$is_host"
)
[[ -n ${LOCAL_ADDR:-} ]] && options+=(--local-addr "$LOCAL_ADDR")

# A restart must not meet the addresses that the failed attempt left in the rendezvous' store (pytorch#135712, #167288).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-300}
# Passed on to the ranks, which then save and end; SIGUSR1 would kill torchrun otherwise. An option of torchrun.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python}" -m torch.distributed.run "${options[@]}" -m "${MODULE:-moetrain}" train "$@"
