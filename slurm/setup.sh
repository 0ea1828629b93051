# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with the files that source this one: slurm/common.sh
# What a job runs and where: arguments of the launcher, the log in work_dir, and the environment of its programs (modules
# and a virtual environment, or a container).

launch_arguments=() # for dist_lm.launch
work_dir=           # absolute
run_id=default      # empty: a file of the user may name it
job_dir=            # this job's own directory in work_dir
token=              # file with the token of the job's Ray
on_node=()          # command that starts a step on the node named after it
on_host=()          # the same, outside the container
on_head=()          # command that runs the driver; empty: the driver runs beside the batch script

say() {
  printf '%(%F %T)T slurm: %s\n' -1 "$*" || true # a full disk must not end the job here
}

# Until the log in work_dir is open, errors go to slurm-JOBID.out where the job was submitted, or where it can be written.
open_early_log() {
  for early_log in "$SLURM_SUBMIT_DIR" "$HOME" "${TMPDIR:-/tmp}"; do
    early_log=$early_log/slurm-$SLURM_JOB_ID.out
    if { : >>"$early_log"; } 2>/dev/null; then
      exec >>"$early_log" 2>&1
      break
    fi
  done
}

read_arguments() { # DEFAULT ... -- ARGUMENT ...
  local defaults=() argument given=
  while [ "$1" != -- ]; do
    defaults+=("$1")
    shift
  done
  shift
  work_dir=work
  for argument in "$@"; do
    case $argument in
    work_dir=*) work_dir=${argument#*=} ;;
    run_id=*) given=${argument#*=} ;;
    experiment=* | --config-dir* | -cd* | hydra.searchpath=*) run_id= ;;
    esac
  done
  run_id=${given:-$run_id}
  if [[ $work_dir != /* ]]; then work_dir=$SLURM_SUBMIT_DIR/$work_dir; fi
  job_dir=$work_dir/slurm/$SLURM_JOB_ID
  token=$job_dir/token

  # this script ends a driver that is late, so the launcher gives its ranks the longest time that a checkpoint may take
  defaults+=("cluster.nodes=$SLURM_JOB_NUM_NODES" "cluster.stop_timeout_s=$checkpoint_most")
  for argument in "${defaults[@]}"; do
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

# From here on all output goes to the log in work_dir; the early log is moved there.
open_log() {
  if ! mkdir -p "$job_dir" || ! : >>"$job_dir/batch.log"; then
    echo "error: work_dir=$work_dir: this job cannot write to $job_dir on $SLURMD_NODENAME; choose another work_dir" >&2
    exit 2
  fi
  if [ -s "$early_log" ]; then cat "$early_log" >>"$job_dir/batch.log"; fi
  exec >>"$job_dir/batch.log" 2>&1 </dev/null
  rm -f "$early_log"
}

load_environment() {
  # job steps inherit what is loaded here, whatever --export was given to sbatch
  export SLURM_EXPORT_ENV=ALL PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  if [ -n "${DIST_LM_INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$DIST_LM_INTERFACE}
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$DIST_LM_INTERFACE}
  fi
  if [ -n "${DIST_LM_MODULES:-}" ]; then load_modules; fi

  # without --exact a step has all CPUs of its node; with --overlap it shares them and the GPUs with other steps
  local step=(srun --overlap --nodes=1 --ntasks=1 --cpu-bind=none --input=none --open-mode=append)
  on_host=("${step[@]}")
  if [ -n "${DIST_LM_CONTAINER:-}" ]; then
    local mounts=$root:$root,$work_dir:$work_dir
    step+=("--container-image=$DIST_LM_CONTAINER" "--container-mounts=$mounts${DIST_LM_MOUNTS:+,$DIST_LM_MOUNTS}")
    step+=("--container-workdir=$root")
    on_head=("${step[@]}" "--nodelist=$SLURMD_NODENAME")
  else
    activate_venv
    cd "$SLURM_SUBMIT_DIR" || exit 2
  fi
  on_node=("${step[@]}")
}

load_modules() {
  local names file
  read -ra names <<<"$DIST_LM_MODULES"
  set +u # the functions of environment modules use unset variables
  for file in /etc/profile.d/lmod.sh /etc/profile.d/modules.sh; do
    if ! type module >/dev/null 2>&1 && [ -f "$file" ]; then
      # shellcheck disable=SC1090
      . "$file"
    fi
  done
  if ! module load "${names[@]}"; then
    say "error: DIST_LM_MODULES=$DIST_LM_MODULES: \`module load\` failed on $SLURMD_NODENAME"
    exit 2
  fi
  set -u
}

activate_venv() {
  local venv=${DIST_LM_VENV:-$root/.venv}
  if [ ! -f "$venv/bin/activate" ]; then
    say "error: no Python environment at $venv on $SLURMD_NODENAME; set DIST_LM_VENV to one that all nodes see, or" \
      "DIST_LM_CONTAINER, or create it: bash launch/quickstart.sh"
    exit 2
  fi
  # shellcheck disable=SC1091
  . "$venv/bin/activate"
}
