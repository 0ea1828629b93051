#!/usr/bin/env bash
# A job step on every worker node, outside any container: if the head node is lost, and with it the batch script, the
# guard requeues the job. (With --no-kill Slurm keeps a job as long as one node lives, even without its batch script.)
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
  # ask Slurm only if the head does not answer, which also happens while Ray starts or after it ended on a healthy node
  if ! answers && is_down; then
    printf '%(%F %T)T slurm: the head node %s is down: requeueing the job\n' -1 "$node"
    scontrol requeue "$SLURM_JOB_ID" || true # the guard of another node may have been faster
  fi
done
