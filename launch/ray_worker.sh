#!/usr/bin/env bash
# One more machine for the Ray cluster that launch/ray_head.sh has started. It stays in the foreground; Ctrl-C ends
# Ray on this machine. It joins again if Ray dies here, and leaves when the head is gone.
#
#   bash launch/ray_worker.sh HEAD_IP[:PORT] [--ip IP | --interface NAME] [--wait-s S] [--cpus N] [--gpus N]
#
# 1. An environment: .venv in this checkout.
# 2. The head's token in $DIST_LM_TOKEN (default: ~/.dist_lm/ray_token, mode 0600).
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
