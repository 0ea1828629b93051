#!/usr/bin/env bash
# Runs as a job step on every worker node, outside any container: when the head's node is lost, and the batch script with
# it, somebody else has to hand the job back to Slurm. (With --no-kill Slurm keeps a job of which a node is left, also
# when it is not the node of the batch script.)
#
#   bash slurm/guard.sh HEAD_NODE HEAD_IP:PORT
set -euo pipefail
node=$1 host=${2%:*} port=${2##*:}
every=3 # seconds

answers() {
  # shellcheck disable=SC2016 # for the inner shell
  timeout "$every" bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$host" "$port" 2>/dev/null
}

is_down() {
  [[ $(sinfo --noheader --nodes="$node" --format=%T | head -n 1) == *down* ]]
}

trap 'exit 0' TERM INT
while :; do
  sleep "$every" &
  wait "$!"
  # Slurm is asked only when the head does not answer: it may be starting, or have ended while its node is well
  if ! answers && is_down; then
    printf '%(%F %T)T slurm: the head node %s is down: handing the job back to Slurm\n' -1 "$node"
    scontrol requeue "$SLURM_JOB_ID" || true # another node may have been faster
  fi
done
