# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # sourced together: slurm/common.sh
# The arguments of a batch script: defaults filled in, work_dir made absolute; and the log in it.

launch_arguments=() # for dist_lm.launch
work_dir=           # absolute
job_dir=            # this job's own directory in it
token=              # file with the token of the job's Ray

read_arguments() { # DEFAULT ... -- ARGUMENT ...
  local defaults=() argument
  while [ "$1" != -- ]; do
    defaults+=("$1")
    shift
  done
  shift
  work_dir=work
  for argument in "$@"; do
    if [[ $argument == work_dir=* ]]; then work_dir=${argument#*=}; fi
  done
  if [[ $work_dir != /* ]]; then work_dir=$SLURM_SUBMIT_DIR/$work_dir; fi
  job_dir=$work_dir/slurm/$SLURM_JOB_ID
  token=$job_dir/token

  for argument in "${defaults[@]}" "cluster.nodes=$SLURM_JOB_NUM_NODES"; do
    if ! is_given "${argument%%=*}" "$@"; then launch_arguments+=("$argument"); fi
  done
  for argument in "$@"; do
    if [[ $argument != work_dir=* ]]; then launch_arguments+=("$argument"); fi
  done
  launch_arguments+=("work_dir=$work_dir")
}

is_given() { # KEY ARGUMENT ...
  local key=$1 argument
  shift
  for argument in "$@"; do
    if [[ $argument == "$key="* ]]; then return 0; fi
  done
  return 1
}

# From here on everything goes to the log in work_dir; what was opened for errors before that is taken away.
open_log() {
  local early=${early_log:-$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID.out}
  if ! mkdir -p "$job_dir" || ! : >>"$job_dir/batch.log"; then
    echo "error: work_dir=$work_dir: this job cannot write to $job_dir on $SLURMD_NODENAME; choose another work_dir" >&2
    exit 2
  fi
  if [ -s "$early" ]; then cat "$early" >>"$job_dir/batch.log"; fi
  exec >>"$job_dir/batch.log" 2>&1 </dev/null
  rm -f "$early"
}
