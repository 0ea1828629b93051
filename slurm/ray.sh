# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with the files that source this one: slurm/common.sh
# The job's Ray: one step per node, the head on the node of the batch script, a new token for every start.
#
# The job keeps running if a worker node dies (--no-kill). Then a replacement is submitted: a job of one node that joins
# the same Ray once Slurm has a free node. The clean-up of this job cancels it.

head=               # name of the head node
workers=()          # names of the other nodes
head_address=       # IP:PORT
head_step=          # process id of the head's srun
head_code=          # its exit code once it has ended; `killed`: it did not react to TERM
guards=()           # process ids of srun: slurm/guard.sh on every worker node
declare -A worker_step=() # process id of srun, by node; entries of ended steps are removed
head_wait=120       # seconds for the head to answer
ask_wait=3          # seconds for the head to answer the stop file
step_wait=8         # seconds for steps to end by themselves
kill_wait=3         # seconds for srun to notice that its step was killed
replaced=0          # replacements submitted so far

find_nodes() {
  local node
  head=$SLURMD_NODENAME
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    if [ "$node" != "$head" ]; then workers+=("$node"); fi
  done
  # below 10000: Ray gives the ports from there to its workers
  head_address=$(address_of_head):$((6400 + SLURM_JOB_ID % 3000))
}

# The address of this node that the other nodes can reach.
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
    # a host may resolve its own name to a loopback address, and other names to real ones
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

# Start the head, wait until it answers, and start the workers, which the driver waits for. Fails if the head fails.
start_ray() {
  local node
  head_code=
  worker_step=()
  guards=()
  rm -f "$job_dir/stop"
  make_token
  say "starting Ray at $head_address, workers: ${workers[*]:-none}"
  "${on_node[@]}" --nodelist="$head" --job-name=ray_head --output="$job_dir/node_$head.log" \
    python -m dist_lm.cluster.ray_node head --address "$head_address" --stop-file "$job_dir/stop" &
  head_step=$!
  local deadline=$((SECONDS + head_wait))
  until (exec 3<>"/dev/tcp/${head_address%:*}/${head_address##*:}") 2>/dev/null; do
    if [ -n "$stop" ]; then return 1; fi
    if ! running "$head_step"; then
      say "Ray on the head node $head failed to start; the end of $job_dir/node_$head.log:"
      tail -n 5 "$job_dir/node_$head.log" || true
      return 1
    fi
    if [ "$SECONDS" -gt "$deadline" ]; then
      say "Ray on the head node $head does not answer at $head_address after $head_wait s; see $job_dir/node_$head.log"
      return 1
    fi
    pause 0.5
  done
  # one srun per node, so that the failure of a node does not affect the others
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
  # noclobber: fails if the file exists, so it never writes through a symbolic link
  if ! (umask 077 && set -C && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$token"); then
    say "error: $token: cannot be created on $SLURMD_NODENAME (the line above says why); it must hold the token of this job's Ray"
    exit 2
  fi
  export RAY_AUTH_TOKEN_PATH=$token
}

# Have the head look whether its Ray is well: TERM reaches all processes of a step, and Ray may end before the head sees
# it. After a TERM from Slurm there is neither time nor need for it.
ask_head() {
  local deadline=$((SECONDS + ask_wait))
  if [ "$stop" = TERM ] || ! : >"$job_dir/stop"; then return 0; fi
  while [ -e "$job_dir/stop" ] && running "$head_step"; do
    if [ "$stop" = TERM ] || [ "$SECONDS" -ge "$deadline" ]; then break; fi
    pause 0.1
  done
  rm -f "$job_dir/stop"
}

# End every step of the job; sets `head_code`. TERM is sent by scancel, because srun would kill its step at once.
stop_ray() {
  if [ -z "$head_step" ]; then return 0; fi
  local steps=("$head_step" "${worker_step[@]}" "${guards[@]}") killed=
  ask_head
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

ended_within() { # SECONDS PID ...; fails if a process still runs after SECONDS
  local deadline=$((SECONDS + $1)) pid
  shift
  for pid in "$@"; do
    while running "$pid"; do
      if [ "$SECONDS" -ge "$deadline" ]; then return 1; fi
      pause 0.2
    done
  done
}

signal_processes() { # SIGNAL PID ...; skips processes that have ended
  local signal=$1 pid
  shift
  for pid in "$@"; do
    if running "$pid"; then kill -s "$signal" "$pid" 2>/dev/null || true; fi
  done
}

signal_steps() { # SIGNAL [NAME of the steps; default: all steps of the job]
  local id name
  while read -r id name; do
    case $id in
    "" | *.batch | *.extern | *.interactive) continue ;;
    esac
    if [ -z "${2:-}" ] || [ "$name" = "$2" ]; then scancel --signal="$1" "$id" </dev/null || true; fi
  done <<<"$(squeue --noheader --steps --job="$SLURM_JOB_ID" --format='%i %j')"
}

# Submit replacements for workers whose step has ended.
replace_lost_workers() {
  local node code
  if [ -n "$stop" ]; then return; fi
  for node in "${!worker_step[@]}"; do
    if running "${worker_step[$node]}"; then continue; fi
    code=0
    wait "${worker_step[$node]}" || code=$?
    unset "worker_step[$node]"
    say "Ray on worker node $node has ended (exit code $code); see $job_dir/node_$node.log"
    if [ "$code" -eq 2 ]; then
      say "no replacement for it: its log names an error that you must correct"
    elif [ "$replaced" -ge $((2 * ${#workers[@]})) ]; then
      say "no replacement for it: $replaced have been submitted, which is the limit for ${#workers[@]} workers"
    else
      submit_replacement
    fi
  done
}

submit_replacement() {
  local id gpus constraint left options=(
    --parsable --nodes=1 --ntasks-per-node=1 --exclusive --no-requeue --open-mode=append
    --job-name="$SLURM_JOB_NAME-node" --output="$job_dir/batch.log" --chdir="$SLURM_SUBMIT_DIR" --export=ALL
    --partition="$SLURM_JOB_PARTITION"
  )
  # GPUs may have been requested by other options than --gpus-per-node: then as many as this node has
  gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
  constraint=$(constraint_of_job)
  left=$(seconds_left)
  if [ -n "${SLURM_JOB_ACCOUNT:-}" ]; then options+=(--account="$SLURM_JOB_ACCOUNT"); fi
  if [ -n "${SLURM_JOB_QOS:-}" ]; then options+=(--qos="$SLURM_JOB_QOS"); fi
  if [ -n "${SLURM_JOB_RESERVATION:-}" ]; then options+=(--reservation="$SLURM_JOB_RESERVATION"); fi
  if [ "$gpus" != 0 ]; then options+=(--gpus-per-node="$gpus"); fi
  if [ -n "$constraint" ]; then options+=(--constraint="$constraint"); fi
  if [ -n "$left" ]; then options+=(--time=$((left / 60 + 1))); fi # minutes
  if id=$(DIST_LM_ROOT=$root DIST_LM_WORK_DIR=$work_dir sbatch "${options[@]}" "$root/slurm/ray_node.sh" "$head_address"); then
    replaced=$((replaced + 1))
    echo "${id%%;*}" >>"$job_dir/replacements"
    say "submitted job ${id%%;*} as a replacement"
  else
    say "warning: no replacement for it: sbatch failed on $head; continuing with the remaining nodes"
  fi
}

constraint_of_job() { # prints nothing if the job has none
  local features
  features=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Features=//p') || true
  features=${features%% DelayBoot=*} # on the same line
  if [ "$features" != "(null)" ]; then echo "$features"; fi
}

# Also those of an earlier start of this job, whose node may have died before its clean-up.
cancel_replacements() {
  local ids
  if [ ! -s "$job_dir/replacements" ]; then return 0; fi
  mapfile -t ids <"$job_dir/replacements"
  scancel --quiet "${ids[@]}" || true
  rm -f "$job_dir/replacements"
}
