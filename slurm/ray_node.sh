#!/usr/bin/env bash
# One more node for the Ray of another job, which submits this by itself (slurm/replacement.sh):
#   sbatch --nodes=1 slurm/ray_node.sh HEAD_IP:PORT
# It takes its environment from that job: RAY_AUTH_TOKEN_PATH, DIST_LM_ROOT, DIST_LM_WORK_DIR and those that
# train_large.sh lists.
set -euo pipefail
root=${DIST_LM_ROOT:?} work_dir=${DIST_LM_WORK_DIR:?}

say() {
  printf '%(%F %T)T slurm: %s\n' -1 "$*"
}

# shellcheck source=SCRIPTDIR/environment.sh
. "$root/slurm/environment.sh"
exec >>"${RAY_AUTH_TOKEN_PATH%/*}/node_$SLURMD_NODENAME.log" 2>&1 # sbatch's %N is the host's name, not the node's
load_environment
: "${work_dir:?}" "${RAY_AUTH_TOKEN_PATH:?}"
say "job $SLURM_JOB_ID on $SLURMD_NODENAME joins $1"
exec "${on_head[@]}" python -m dist_lm.cluster.ray_node worker --head "$1" --wait-s 60 \
  ${DIST_LM_INTERFACE:+"--interface=$DIST_LM_INTERFACE"}
