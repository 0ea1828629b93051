# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with slurm/common.sh, which is sourced before
# Sourced by slurm/serve.sh: servers that are children of the batch script, which tells them when to end.
#
# In a job of several nodes the server uses a Ray of the job's own over all of them, with one actor for each GPU (--tp
# GPUs) of every node. A lost worker node is replaced as in other jobs; without the first node Slurm requeues the job.
# Files are in slurm-JOBID beside the log, in the directory of submission:
#   node_NAME.log  Ray on one node
#   token          of the job's Ray, mode 0600, while it runs

server_wait=50 # seconds for the server to end; the job has 60 before its time limit

serve_over_nodes() { # ARGUMENT of `dist-lm serve` ...; does not return
  job_dir=$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID
  token=$job_dir/token
  if ! mkdir -p "$job_dir"; then
    say "error: this job cannot write to $job_dir on $SLURMD_NODENAME; submit it from a folder that all nodes share"
    exit 2
  fi
  trap clean_up EXIT
  trap 'stop=TERM' TERM
  find_nodes
  if ! start_ray; then exit 1; fi

  # The server starts with the nodes that have joined, and takes in the others as they do. Later options win.
  start_server --actors -1 --ray "$head_address" --nodes "$SLURM_JOB_NUM_NODES" "$@"
  while running "$driver"; do
    if [ "$stop" = TERM ]; then
      end_server
    elif ! running "$head_step"; then
      say "error: Ray on the head node $head has ended; see $job_dir/node_$head.log"
      end_server
      exit 1
    else
      replace_lost_workers
      pause 1
    fi
  done
  exit_as_server
}

serve_in_container() { # ARGUMENT of `dist-lm serve` ...; on one node; does not return
  trap 'stop=TERM' TERM
  start_server "$@"
  while running "$driver"; do
    if [ "$stop" = TERM ]; then end_server; else pause 1; fi
  done
  exit_as_server
}

start_server() { # ARGUMENT of `dist-lm serve` ...
  "${on_head[@]}" ${on_head[0]:+--job-name=driver} python -m dist_lm serve "$@" </dev/null &
  driver=$!
}

exit_as_server() {
  local code=0
  wait "$driver" || code=$?
  exit "$code"
}

# Let the server give answers under way their time.
end_server() {
  # srun does not forward TERM but kills its step
  if [ "${#on_head[@]}" -gt 0 ]; then signal_steps TERM driver; else signal_processes TERM "$driver"; fi
  if ! ended_within "$server_wait" "$driver"; then end_driver 0; fi
}
