# shellcheck shell=bash
# Sourced by the batch scripts: the life of a job. It runs on the first node, starts a Ray of its own as job steps, runs
# `python -m dist_lm.launch` as a driver of that Ray, and decides what to do when something ends.
#
#   the driver has finished                   the job is COMPLETED (after a second start if Ray was not well at the end)
#   the driver refuses (2) or gives up (1)    the job is FAILED; the last lines of the log say why
#   nodes are missing (75)                    requeue
#   the driver or Ray on the head is killed   Ray and driver start again and continue from the last checkpoint
#   a worker node dies                        a replacement job joins when a node is free (slurm/ray.sh); meanwhile the
#                                             driver continues with the remaining nodes
#   this node dies                            Slurm requeues the job
#   USR1 (before the time limit: --signal)    checkpoint, clean-up, requeue
#   TERM (scancel, shutdown)                  clean-up at once
#
# Nothing is written outside work_dir, which must be on a file system that all nodes share. In work_dir/slurm/JOBID:
#   batch.log      this script and the driver, all restarts
#   node_NAME.log  Ray on one node; ranks write their logs below work_dir/runs
#   token          of the job's Ray, mode 0600, while it runs
#
# Optional environment variables, read at submission:
#   DIST_LM_VENV        Python environment that all nodes see (default: .venv in the checkout)
#   DIST_LM_MODULES     environment modules to load first, e.g. "cuda/13.0 gcc"
#   DIST_LM_CONTAINER   image for every step, by pyxis, instead of DIST_LM_VENV; DIST_LM_MOUNTS: additional mounts
#   DIST_LM_INTERFACE   network interface of the nodes to use, e.g. ib0
#   DIST_LM_ROOT        the checkout, if Slurm does not tell where the batch script came from

: "${root:?}"
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then # older ones treat empty arrays as unset
  echo "error: bash $BASH_VERSION on ${SLURMD_NODENAME:-this node} is too old: $root/slurm needs bash 4.4" |
    tee -a "$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID.out" >&2
  exit 2
fi
# shellcheck source=SCRIPTDIR/setup.sh
. "$root/slurm/setup.sh"
# shellcheck source=SCRIPTDIR/ray.sh
. "$root/slurm/ray.sh"

most_failures=5    # starts in a row that fail without progress
checkpoint_wait=75 # seconds for the driver to leave after USR1, if Slurm does not tell when the job must end
checkpoint_most=900
checkpoint_until=0 # SECONDS
term_wait=2        # seconds for the driver to leave after TERM: Slurm may kill everything 5 s after TERM
stop=              # USR1 or TERM, once received
stop_at=0          # SECONDS when it was received
driver=            # process id of the driver while it runs
outcome=           # of a start: an exit code of the job, `lost` or `requeue`
code_before=none   # exit code of the driver at the previous start; none: it was not started

running() { # PID
  [ -n "$1" ] && kill -0 "$1" 2>/dev/null
}

pause() { # SECONDS; a signal ends it
  sleep "$1" &
  wait "$!" || true
}

run_job() { # DEFAULT ... -- ARGUMENT ...; does not return
  open_early_log
  read_arguments "$@"
  open_log
  trap clean_up EXIT
  trap 'request_stop USR1' USR1
  trap 'request_stop TERM' TERM
  say "job $SLURM_JOB_ID (restart ${SLURM_RESTART_COUNT:-0}) on $SLURM_JOB_NODELIST: ${launch_arguments[*]}"
  load_environment
  find_nodes

  local failures=0 before
  while :; do
    before=$(progress)
    run_once
    case $outcome in
    lost) ;;
    requeue) requeue ;;
    *) exit "$outcome" ;;
    esac
    if [ "$(progress)" = "$before" ]; then failures=$((failures + 1)); else failures=0; fi
    if [ "$failures" -ge "$most_failures" ]; then
      say "error: $failures starts in a row failed without a new checkpoint; see above and $job_dir/node_$head.log"
      exit 1
    fi
    say "starting again (failures without progress: $failures in a row, at most $most_failures)"
  done
}

# One start of Ray and of the driver; sets `outcome`.
run_once() {
  if ! start_ray; then
    stop_ray
    judge none no
    return
  fi
  "${on_head[@]}" ${on_head[0]:+--job-name=driver} python -m dist_lm.launch "${launch_arguments[@]}" \
    cluster=ray "cluster.address=$head_address" "cluster.token_path=$token" </dev/null &
  driver=$!
  if [ -n "$stop" ]; then tell_driver "$stop"; fi # received before the driver was started
  while running "$driver"; do
    if [ "$stop" = USR1 ] && [ "$SECONDS" -gt "$checkpoint_until" ]; then
      say "the driver has not left within $((SECONDS - stop_at)) s of USR1"
      end_driver 2
    elif [ "$stop" = TERM ]; then
      end_driver "$term_wait"
    elif ! running "$head_step"; then
      say "Ray on the head node $head has ended"
      end_driver 5
    else
      replace_lost_workers
      pause 1
    fi
  done
  local code=0 head_well=no head_ran=no
  wait "$driver" || code=$?
  driver=
  if running "$head_step"; then head_ran=yes; fi
  [ "$code" -le 128 ] || [ -n "$stop" ] || pause 1 # the same signal may reach the driver first
  stop_ray
  # a head that ran and had to be killed was healthy; only its clean-up was slow
  case $head_ran:$head_code in yes:0 | yes:killed) head_well=yes ;; esac
  judge "$code" "$head_well"
}

judge() { # DRIVER_CODE HEAD_WELL; sets and logs `outcome`
  outcome=$(outcome_of "$stop" "$1" "$2" "$code_before")
  say "exit code of the driver: $1${stop:+, after $stop}; of Ray on the head: ${head_code:-none} (well: $2); so: $outcome"
  code_before=$1
}

# The consequence of a start.
#   STOP         USR1, TERM or empty
#   DRIVER_CODE  exit code; none: the driver was not started
#   HEAD_WELL    yes if Ray on the head was well until it was stopped, or no
#   CODE_BEFORE  exit code of the driver at the previous start
outcome_of() { # STOP DRIVER_CODE HEAD_WELL CODE_BEFORE
  if [ "$1" = TERM ]; then
    echo 143
  elif [ "$1" = USR1 ] && [ "$2" != 0 ] && [ "$2" != 2 ]; then
    echo requeue
  elif [ "$3" = no ] && [ "$2 $4" != "0 0" ]; then
    # a driver whose Ray dies may exit with 0; a second start that finds everything complete confirms success
    echo lost
  else
    case $2 in
    0 | 1 | 2 | 130 | 143) echo "$2" ;;
    75) echo requeue ;;  # nodes are missing: Slurm starts the job when it has enough again
    138) echo requeue ;; # USR1 was sent to the driver itself
    *) echo lost ;;
    esac
  fi
}

request_stop() { # USR1 or TERM; a trap
  say "received $1"
  if [ "$stop" != TERM ]; then
    stop=$1
    stop_at=$SECONDS
    checkpoint_until=$((SECONDS + $(seconds_for_a_checkpoint)))
  fi
  tell_driver "$1"
}

# Seconds until the time limit; nothing if Slurm does not tell, or if it extended the limit that it told at the start.
seconds_left() {
  local left=$((${SLURM_JOB_END_TIME:-0} - $(printf '%(%s)T' -1)))
  if [ "$left" -gt 0 ]; then echo "$left"; fi
}

# Seconds until the time limit, less those of the clean-up.
seconds_for_a_checkpoint() {
  local left
  left=$(seconds_left)
  if [ -n "$left" ]; then left=$((left - 45)); else left=$checkpoint_wait; fi
  if [ "$left" -gt "$checkpoint_most" ]; then left=$checkpoint_most; fi
  if [ "$left" -lt 10 ]; then left=10; fi
  echo "$left"
}

tell_driver() { # USR1 or TERM: write a checkpoint and leave
  # srun does not forward TERM but kills its step
  if [ "${#on_head[@]}" -gt 0 ]; then set -- USR1; fi
  if running "$driver"; then kill -s "$1" "$driver" 2>/dev/null || true; fi
}

end_driver() { # SECONDS between TERM and KILL
  tell_driver TERM
  if ended_within "$1" "$driver"; then return 0; fi
  # in a container the driver is a step, which would outlive its srun
  if [ "${#on_head[@]}" -gt 0 ]; then signal_steps KILL driver; fi
  signal_processes KILL "$driver"
}

requeue() {
  clean_up
  if [ "$stop" = TERM ]; then exit 143; fi # scancel was called meanwhile
  if [ -e "$job_dir/progress" ] && [ "$(progress)" = "$(<"$job_dir/progress")" ]; then
    say "error: not requeued: no progress since the last requeue; check that the time limit is long enough for a checkpoint"
    exit 1
  fi
  progress >"$job_dir/progress"
  say "requeued; the job continues from the last checkpoint"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    say "error: Slurm does not requeue this job; the same sbatch command continues from the last checkpoint"
    exit 1
  fi
  exit 0
}

# May be called twice. Must not use `return` without a number, which in the trap of a failure returns that failure.
clean_up() {
  trap - EXIT
  rm -f "$token" || true
  cancel_replacements || true
  if running "$driver"; then end_driver 1; fi
  stop_ray
  say "cleaned up"
}

# Progress so far, as text that changes with every checkpoint, file of samples, tar of a corpus, task of a build and
# finished stage of this run; of all runs where a file of the user may name it.
progress() {
  local file run runs=("$work_dir"/runs/*/"$run_id")
  if [ -z "$run_id" ]; then runs=("$work_dir"/runs/*/*); fi
  for run in "${runs[@]}" "$work_dir"/runs/import/*; do
    for file in "$run"/checkpoints/LATEST "$run"/result.json; do
      if [ -f "$file" ]; then printf '%s\n' "$file" "$(<"$file")"; fi
    done
    for file in "$run"/samples/part-*.jsonl "$run"/samples/*/*.jsonl; do
      if [ -f "$file" ]; then printf '%s\n' "$file"; fi
    done
  done
  for file in "$work_dir"/corpora/*/manifest.json "$work_dir"/tokenizer/report.json; do
    if [ -f "$file" ]; then printf '%s\n' "$file" "$(<"$file")"; fi
  done
  for file in "$work_dir"/builds/*/*/*/result.json; do
    if [ -f "$file" ]; then printf '%s\n' "$file"; fi
  done
  for file in "$work_dir"/corpora/*/journal.jsonl; do
    if [ -f "$file" ]; then grep '^{"finished"' "$file" || true; fi
  done
}
