#!/usr/bin/env bash
# Add this machine to the Ray cluster that launch/ray_head.sh has started. It stays in the foreground. Ctrl-C ends Ray
# here. If Ray dies here, the machine joins again; if the head is gone, the script ends.
#
#   bash launch/ray_worker.sh HEAD_IP[:PORT] [--ip IP | --interface NAME] [--wait-s S] [--cpus N] [--gpus N]
#
# 1. Creates an environment: .venv in this checkout.
# 2. Reads the head's token from $DIST_LM_TOKEN (default: ~/.dist_lm/ray_token, mode 0600).
set -euo pipefail
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case ${1:-} in
"" | -*) echo "usage: bash launch/ray_worker.sh HEAD_IP[:PORT] [--ip IP | --interface NAME] ..., as ray_head.sh prints it" >&2; exit 2 ;;
*:*) head=$1 ;;
*) head=$1:6400 ;;
esac
shift

export RAY_AUTH_TOKEN_PATH=${DIST_LM_TOKEN:-$HOME/.dist_lm/ray_token}
exec python -m dist_lm.cluster.ray_node worker --head "$head" "$@"
