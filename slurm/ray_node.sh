#!/usr/bin/env bash
# A replacement node for the Ray of another job, which submits this script itself (slurm/ray.sh):
#   sbatch --nodes=1 slurm/ray_node.sh HEAD_IP:PORT
# Its environment comes from that job: RAY_AUTH_TOKEN_PATH, DIST_LM_ROOT, DIST_LM_WORK_DIR, and the variables that
# slurm/common.sh lists.
set -euo pipefail
root=${DIST_LM_ROOT:?}
# shellcheck source=SCRIPTDIR/setup.sh
. "$root/slurm/setup.sh"
# shellcheck disable=SC2034 # used by load_environment
work_dir=${DIST_LM_WORK_DIR:?}
exec >>"${RAY_AUTH_TOKEN_PATH%/*}/node_$SLURMD_NODENAME.log" 2>&1 # sbatch's %N is the host name, not the node name
load_environment
say "job $SLURM_JOB_ID on $SLURMD_NODENAME joins $1"
exec "${on_head[@]}" python -m dist_lm.cluster.ray_node worker --head "$1" --wait-s 60 \
  ${DIST_LM_INTERFACE:+"--interface=$DIST_LM_INTERFACE"}
