# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # sourced together: slurm/common.sh
# What programs of a job run in: modules and a virtual environment, or a container; and how a job step is started.

on_node=() # command that starts a step on the node named after it
on_host=() # the same, but outside the container
on_head=() # command that runs the driver; empty: it runs beside the batch script

load_environment() {
  # a step inherits what is loaded here, whatever --export sbatch was given
  export SLURM_EXPORT_ENV=ALL PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  if [ -n "${DIST_LM_INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$DIST_LM_INTERFACE}
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$DIST_LM_INTERFACE}
  fi
  if [ -n "${DIST_LM_MODULES:-}" ]; then load_modules; fi

  # without --exact a step has all CPUs of its node; --overlap: it also shares them, and the GPUs, with other steps
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
  set +u # the functions of environment modules use variables that may be unset
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
      "DIST_LM_CONTAINER, or make it: bash launch/quickstart.sh"
    exit 2
  fi
  # shellcheck disable=SC1091
  . "$venv/bin/activate"
}
