#!/usr/bin/env bash
# Run the ranks of a prepared run by torchrun alone, without Ray and the launcher: for debuggers, profilers, and
# schedulers that start one command per node. The run directory must contain the config.yaml that the launcher wrote.
#
#   bash launch/torchrun.sh RUN_DIR [torchrun option ...]        e.g.  work/runs/code/default --nproc-per-node 2
#
# On several nodes run the same command on each of them, with
#   NNODES        number of nodes (default: 1)
#   NODE_RANK     number of this node, from 0
#   MASTER_ADDR   address of node 0 that the other nodes can reach
#   MASTER_PORT   a free port there (default: 29500)
# A failed rank is not restarted (--max-restarts 0): the same command continues from the newest checkpoint.
set -euo pipefail
here=$PWD
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$here"

run=${1:-}
if [ ! -f "$run/config.yaml" ]; then
  echo "error: '$run' is not a run directory with a config.yaml; usage: bash launch/torchrun.sh RUN_DIR [torchrun option ...]" >&2
  exit 2
fi
shift
nodes=${NNODES:-1}
if [ "$nodes" -gt 1 ]; then
  : "${NODE_RANK:?NNODES=$nodes needs NODE_RANK: the number of this node, from 0}"
  : "${MASTER_ADDR:?NNODES=$nodes needs MASTER_ADDR: the address of node 0}"
fi
exec python -m torch.distributed.run \
  --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  --max-restarts 0 "$@" -m dist_lm.train "$run"
