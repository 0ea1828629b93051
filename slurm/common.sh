# shellcheck shell=bash
# Sourced by the batch scripts: the life of a job. It runs on the first node, starts a Ray of its own as job steps, runs
# `python -m dist_lm.launch` as a driver of it, and decides what to do when something ends.
#
#   the driver is done                        the job is COMPLETED; if Ray was not well at the end, after a second start
#   the driver refuses (2) or gives up (1)    the job is FAILED; the log's last lines say why
#   nodes are missing (75)                    requeue
#   the driver or the head's Ray is killed    Ray and driver are started again, and continue from the last checkpoint
#   a worker node dies                        a replacement job joins when a node is free (slurm/replacement.sh);
#                                             the driver goes on with what there is
#   this node dies                            Slurm requeues the job
#   USR1 (before the time limit: --signal)     checkpoint, clean-up, requeue
#   TERM (scancel, shutdown)                  clean-up at once
#
# work_dir must be on a file system that all nodes share. In work_dir/slurm/JOBID:
#   batch.log      this script and the driver, all restarts
#   node_NAME.log  Ray on one node; ranks write theirs below work_dir/runs
#   token          of the job's Ray, mode 0600, while it runs

: "${root:?}"
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then # empty arrays are unset to an older one
  echo "error: bash $BASH_VERSION on ${SLURMD_NODENAME:-this node} is too old: $root/slurm needs bash 4.4" >&2
  exit 2
fi
# shellcheck source=SCRIPTDIR/arguments.sh
. "$root/slurm/arguments.sh"
# shellcheck source=SCRIPTDIR/environment.sh
. "$root/slurm/environment.sh"
# shellcheck source=SCRIPTDIR/ray_steps.sh
. "$root/slurm/ray_steps.sh"
# shellcheck source=SCRIPTDIR/replacement.sh
. "$root/slurm/replacement.sh"

most_failures=5   # starts in a row that end badly and without progress
checkpoint_wait=75 # seconds for the driver to leave after USR1, where Slurm does not say when the job must end
checkpoint_most=900
checkpoint_until=0 # SECONDS
term_wait=2       # and after TERM: Slurm may kill everything 5 s after it
stop=             # USR1 or TERM, once it has come
stop_at=0         # SECONDS when it came
driver=           # process id of the driver while it runs
outcome=          # of a start: an exit code of the job, `lost` or `requeue`
code_before=none  # of the driver at the start before this one; none: it was not started

say() {
  printf '%(%F %T)T slurm: %s\n' -1 "$*" || true # a full disk must not end the job here
}

running() { # PID
  [ -n "$1" ] && kill -0 "$1" 2>/dev/null
}

pause() { # SECONDS; a signal ends it
  sleep "$1" &
  wait "$!" || true
}

run_job() { # DEFAULT ... -- ARGUMENT ...
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
      say "error: ended badly $failures times in a row without a new checkpoint; see above and $job_dir/node_$head.log"
      exit 1
    fi
    say "starting again (without progress: $failures of at most $most_failures in a row)"
  done
}

# One start of Ray and the driver; sets `outcome`.
run_once() {
  if ! start_ray; then
    stop_ray
    judge none no
    return
  fi
  "${on_head[@]}" ${on_head[0]:+--job-name=driver} python -m dist_lm.launch "${launch_arguments[@]}" \
    cluster=ray "cluster.address=$head_address" "cluster.token_path=$token" </dev/null &
  driver=$!
  if [ -n "$stop" ]; then tell_driver "$stop"; fi # it came before there was a driver
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
  [ "$code" -le 128 ] || [ -n "$stop" ] || pause 1 # the signal may have come to the driver first
  stop_ray
  # a head that had to be killed says nothing against its Ray: only its clean-up was slow
  case $head_ran:$head_code in yes:0 | yes:killed) head_well=yes ;; esac
  judge "$code" "$head_well"
}

judge() { # DRIVER_CODE HEAD_WELL; says and sets `outcome`
  outcome=$(outcome_of "$stop" "$1" "$2" "$code_before")
  say "exit code of the driver: $1${stop:+, after $stop}; of Ray on the head: ${head_code:-none} (well: $2); so: $outcome"
  code_before=$1
}

# What follows from a start.
#   STOP         USR1, TERM or nothing
#   DRIVER_CODE  none: it was not started
#   HEAD_WELL    yes: Ray on the head was well until it was stopped; no
#   CODE_BEFORE  of the driver at the start before
outcome_of() { # STOP DRIVER_CODE HEAD_WELL CODE_BEFORE
  if [ "$1" = TERM ]; then
    echo 143
  elif [ "$1" = USR1 ] && [ "$2" != 0 ] && [ "$2" != 2 ]; then
    echo requeue
  elif [ "$3" = no ] && [ "$2 $4" != "0 0" ]; then
    # a driver whose Ray dies may even leave with 0; it is believed when a second start finds everything there
    echo lost
  else
    case $2 in
    0 | 1 | 2 | 130 | 143) echo "$2" ;;
    75) echo requeue ;;  # nodes are missing: Slurm knows when there are enough again
    138) echo requeue ;; # somebody sent USR1 to the driver itself
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

# Until the time limit; nothing where Slurm does not say, or has put it off: what it said at the start is past then.
seconds_left() {
  local left=$((${SLURM_JOB_END_TIME:-0} - $(printf '%(%s)T' -1)))
  if [ "$left" -gt 0 ]; then echo "$left"; fi
}

# What is left until the time limit, but for the clean-up.
seconds_for_a_checkpoint() {
  local left
  left=$(seconds_left)
  if [ -n "$left" ]; then left=$((left - 45)); else left=$checkpoint_wait; fi
  if [ "$left" -gt "$checkpoint_most" ]; then left=$checkpoint_most; fi
  if [ "$left" -lt 10 ]; then left=10; fi
  echo "$left"
}

tell_driver() { # USR1 or TERM: write a checkpoint and leave
  # srun would not pass TERM on but kill
  if [ "${#on_head[@]}" -gt 0 ]; then set -- USR1; fi
  if running "$driver"; then kill -s "$1" "$driver" 2>/dev/null || true; fi
}

end_driver() { # SECONDS between TERM and KILL
  tell_driver TERM
  if ended_within "$1" "$driver"; then return 0; fi
  # in a container it is a step, which would outlive its srun
  if [ "${#on_head[@]}" -gt 0 ]; then signal_steps KILL driver; fi
  signal_processes KILL "$driver"
}

requeue() {
  clean_up
  if [ "$stop" = TERM ]; then exit 143; fi # scancel came meanwhile
  if [ -e "$job_dir/progress" ] && [ "$(progress)" = "$(<"$job_dir/progress")" ]; then
    say "error: not requeued: no new checkpoint since the last requeue; does a start fit into the time limit?"
    exit 1
  fi
  progress >"$job_dir/progress"
  say "requeued; it continues from the last checkpoint"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    say "error: Slurm does not requeue this job; the same sbatch command continues from the last checkpoint"
    exit 1
  fi
  exit 0
}

# May be called twice. In the trap of a failure a `return` without a number returns that failure, and ends it there.
clean_up() {
  trap - EXIT
  rm -f "$token" || true
  cancel_replacements || true
  if running "$driver"; then end_driver 1; fi
  stop_ray
  say "cleaned up"
}

# What has been achieved, as text that changes with every checkpoint, file of samples and finished stage.
progress() {
  local file
  for file in "$work_dir"/runs/*/*/checkpoints/LATEST "$work_dir"/runs/*/*/result.json \
    "$work_dir"/corpora/*/manifest.json "$work_dir"/tokenizer/report.json; do
    if [ -f "$file" ]; then printf '%s\n' "$file" "$(<"$file")"; fi
  done
  for file in "$work_dir"/runs/generate/*/samples/part-*.jsonl; do
    if [ -f "$file" ]; then printf '%s\n' "$file"; fi
  done
}
