#!/usr/bin/env bash
# Start the head of a Ray cluster of your own machines, without Slurm: run it on one machine, then
# launch/ray_worker.sh on each of the others. It stays in the foreground. Ctrl-C ends Ray here, then the workers leave.
#
#   bash launch/ray_head.sh IP[:PORT] [--cpus N] [--gpus N]      IP: this machine's address in the cluster's network
#
# 1. Creates an environment: .venv in this checkout. All machines need the same checkout and work directory.
# 2. Creates a token once in $DIST_LM_TOKEN (default: ~/.dist_lm/ray_token, mode 0600). Whoever has the token can run
#    code on the cluster. If the home directory is not shared, copy the file to the other machines (scp -p).
# 3. Prints the commands for the other machines and for the launch, and starts Ray.
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
To train, on any machine (NODES: number of machines):
  python -m dist_lm.launch stage=code cluster=ray cluster.nodes=NODES \\
    cluster.address=$address cluster.token_path=$token work_dir=/a/shared/directory
TEXT
exec python -m dist_lm.cluster.ray_node head --address "$address" "$@"
