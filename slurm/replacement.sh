# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # sourced together: slurm/common.sh
# A job keeps running when a worker node dies (--no-kill). A replacement is a job of one node that joins the same Ray as
# soon as Slurm has a node free; it is cancelled with the job's clean-up.

replaced=0 # how many have been submitted

# Look after workers whose step has ended.
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
      say "no replacement for it: its log names something to mend"
    elif [ "$replaced" -ge $((2 * ${#workers[@]})) ]; then
      say "no replacement for it: $replaced have been submitted, the most for ${#workers[@]} workers"
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
  # asked for with --gpus-per-node, or in another way: then as many as there are on this node
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
    say "warning: no replacement for it: sbatch does not work on $head; going on with the nodes that are left"
  fi
}

constraint_of_job() { # nothing where it was given none
  local features
  features=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Features=//p') || true
  features=${features%% DelayBoot=*} # on the same line
  if [ "$features" != "(null)" ]; then echo "$features"; fi
}

# Those of an earlier life of this job too: its node may have died before it could.
cancel_replacements() {
  local ids
  if [ ! -s "$job_dir/replacements" ]; then return 0; fi
  mapfile -t ids <"$job_dir/replacements"
  scancel --quiet "${ids[@]}" || true
  rm -f "$job_dir/replacements"
}
