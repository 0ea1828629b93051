# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # sourced together: slurm/common.sh
# The job's Ray: one step a node, the head on the node of the batch script; a new token for every start.

head=               # name of the head's node
workers=()          # names of the others
head_address=       # IP:PORT
head_step=          # process id of the head's srun
head_code=          # its exit code once it has ended; `killed`: it did not end when it was asked to
guards=()           # process ids of srun: slurm/guard.sh on every worker node
declare -A worker_step=() # process id of srun, by node; those that have ended are taken out
head_wait=120       # seconds for the head to answer
step_wait=8         # seconds for steps to end by themselves
kill_wait=3         # and for srun to see that its step was killed

find_nodes() {
  local node
  head=$SLURMD_NODENAME
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    if [ "$node" != "$head" ]; then workers+=("$node"); fi
  done
  # below 10000, where Ray begins to give ports to its workers
  head_address=$(address_of_head):$((6400 + SLURM_JOB_ID % 3000))
}

# The address of this node that the others reach.
address_of_head() {
  local address node
  if [ -n "${DIST_LM_INTERFACE:-}" ]; then
    address=$(ip -4 -o addr show dev "$DIST_LM_INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }')
    if [ -z "$address" ]; then
      say "error: DIST_LM_INTERFACE=$DIST_LM_INTERFACE: no IPv4 address on $head" >&2
      exit 2
    fi
  else
    address=$(address_of_name "$head")
    # a host may know itself by a loopback address, and the others by real ones
    for node in "${workers[@]}"; do
      if [[ $address == 127.* && $(address_of_name "$node") != 127.* ]]; then address=; fi
    done
    if [ -z "$address" ] || [ "$address" = 127.0.0.1 ]; then address=$(hostname -I | awk '{ print $1 }'); fi
    if [ -z "$address" ]; then
      say "error: no address for node $head, neither of its name nor of an interface; set DIST_LM_INTERFACE" >&2
      exit 2
    fi
  fi
  echo "$address"
}

address_of_name() { # NODE
  getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }'
}

# Start the head, wait until it answers, start the workers (they are waited for by the driver). Fails if it does not.
start_ray() {
  local node
  head_code=
  worker_step=()
  guards=()
  make_token
  say "starting Ray at $head_address, workers: ${workers[*]:-none}"
  "${on_node[@]}" --nodelist="$head" --job-name=ray_head --output="$job_dir/node_$head.log" \
    python -m dist_lm.cluster.ray_node head --address "$head_address" &
  head_step=$!
  local deadline=$((SECONDS + head_wait))
  until (exec 3<>"/dev/tcp/${head_address%:*}/${head_address##*:}") 2>/dev/null; do
    if [ -n "$stop" ]; then return 1; fi
    if ! running "$head_step"; then
      say "Ray on the head node $head ended at its start; the end of $job_dir/node_$head.log:"
      tail -n 5 "$job_dir/node_$head.log" || true
      return 1
    fi
    if [ "$SECONDS" -gt "$deadline" ]; then
      say "Ray on the head node $head does not answer at $head_address after $head_wait s; see $job_dir/node_$head.log"
      return 1
    fi
    pause 0.5
  done
  # one srun a node: what happens to one of them does not touch the others
  for node in "${workers[@]}"; do
    "${on_node[@]}" --nodelist="$node" --job-name=ray_worker --output="$job_dir/node_$node.log" \
      python -m dist_lm.cluster.ray_node worker --head "$head_address" \
      ${DIST_LM_INTERFACE:+"--interface=$DIST_LM_INTERFACE"} &
    worker_step[$node]=$!
    "${on_host[@]}" --nodelist="$node" --job-name=guard --output="$job_dir/node_$node.log" \
      bash "$root/slurm/guard.sh" "$head" "$head_address" &
    guards+=("$!")
  done
}

make_token() {
  rm -f "$token" || true
  # noclobber: made anew or not at all, never written through a link that somebody has put there
  if ! (umask 077 && set -C && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$token"); then
    say "error: $token: cannot be made anew on $SLURMD_NODENAME (why: the line above); it is the token of this job's Ray"
    exit 2
  fi
  export RAY_AUTH_TOKEN_PATH=$token
}

# End every step of the job; sets `head_code`. TERM goes by scancel: srun, given it, would kill without grace.
stop_ray() {
  if [ -z "$head_step" ]; then return 0; fi
  local steps=("$head_step" "${worker_step[@]}" "${guards[@]}") killed=
  signal_steps TERM
  if ! ended_within "$step_wait" "${steps[@]}"; then
    if running "$head_step"; then killed=killed; fi
    signal_steps KILL
    signal_processes TERM "${steps[@]}"
    ended_within "$kill_wait" "${steps[@]}" || signal_processes KILL "${steps[@]}"
  fi
  head_code=0
  wait "$head_step" || head_code=$?
  head_code=${killed:-$head_code}
  head_step=
}

ended_within() { # SECONDS PID ...; fails if one of them still runs then
  local deadline=$((SECONDS + $1)) pid
  shift
  for pid in "$@"; do
    while running "$pid"; do
      if [ "$SECONDS" -ge "$deadline" ]; then return 1; fi
      pause 0.2
    done
  done
}

signal_processes() { # SIGNAL PID ...; those that have ended are passed over
  local signal=$1 pid
  shift
  for pid in "$@"; do
    if running "$pid"; then kill -s "$signal" "$pid" 2>/dev/null || true; fi
  done
}

signal_steps() { # SIGNAL [NAME of the steps; without it: all of the job]
  local id name
  while read -r id name; do
    case $id in
    "" | *.batch | *.extern | *.interactive) continue ;;
    esac
    if [ -z "${2:-}" ] || [ "$name" = "$2" ]; then scancel --signal="$1" "$id" </dev/null || true; fi
  done <<<"$(squeue --noheader --steps --job="$SLURM_JOB_ID" --format='%i %j')"
}
