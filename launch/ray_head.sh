#!/usr/bin/env bash
# The head of a Ray cluster of your own machines, without Slurm: run it on one of them, then launch/ray_worker.sh on
# each of the others. It stays in the foreground; Ctrl-C ends Ray on this machine, and the workers follow.
#
#   bash launch/ray_head.sh IP[:PORT] [--cpus N] [--gpus N]      IP: this machine's address in the cluster's network
#
# 1. An environment: .venv in this checkout. Every machine needs the same checkout and sees the same work directory.
# 2. A token, made once in $DIST_LM_TOKEN (default: ~/.dist_lm/ray_token, mode 0600). Whoever holds it runs code on
#    the cluster. Where home is not shared, copy the file to the other machines yourself (scp -p).
# 3. The commands for the other machines and for the launch are printed, and Ray starts.
set -euo pipefail
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case ${1:-} in
"" | -*) echo "usage: bash launch/ray_head.sh IP[:PORT] [--cpus N] [--gpus N]; hostname -I shows this machine's" >&2; exit 2 ;;
*:*) address=$1 ;;
*) address=$1:6400 ;;
esac
shift

token=${DIST_LM_TOKEN:-$HOME/.dist_lm/ray_token}
if [ ! -e "$token" ]; then
  (
    umask 077
    mkdir -p "$(dirname "$token")"
    python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token"
  )
fi
export RAY_AUTH_TOKEN_PATH=$token

cat <<TEXT
On every other machine, with the same token file:
  DIST_LM_TOKEN=$token bash launch/ray_worker.sh $address
To train, on any of them (NODES: how many machines):
  python -m dist_lm.launch stage=code cluster=ray cluster.nodes=NODES \\
    cluster.address=$address cluster.token_path=$token work_dir=/a/shared/directory
TEXT
exec python -m dist_lm.cluster.ray_node head --address "$address" "$@"
