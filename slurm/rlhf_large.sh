#!/usr/bin/env bash
# Reward model and PPO for a large model, on the nodes of a Slurm job.
#
#   sbatch [--nodes=N] [--gpus-per-node=G] [--time=T] slurm/rlhf_large.sh [key=value ...]
#
# Arguments go to `python -m dist_lm.launch`, after stage=rlhf model=large cluster.nodes=(those of the job)
# work_dir=work (below the directory of submission). The same command after a failure continues.
#
# Nothing is written outside work_dir; slurm/common.sh says what lies where, what is survived, and how. Variables of the
# environment at submission (all optional):
#   DIST_LM_VENV        Python environment that all nodes see (default: .venv in the checkout)
#   DIST_LM_MODULES     environment modules to load first, e.g. "cuda/13.0 gcc"
#   DIST_LM_CONTAINER   image for every step, by pyxis, in place of DIST_LM_VENV; DIST_LM_MOUNTS: mounts to add
#   DIST_LM_INTERFACE   network interface of the nodes to use, e.g. ib0
#   DIST_LM_ROOT        the checkout, where Slurm does not say where this script came from
# Options below are defaults: those on sbatch's command line win.
#SBATCH --job-name=dist_lm_rlhf
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
# an iteration that has begun is finished before the checkpoint, and takes longer than a step of training
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=/dev/null
set -euo pipefail
: "${SLURM_JOB_ID:?this is a batch script: sbatch slurm/rlhf_large.sh}"
# until the log in work_dir is open, an error must not vanish
for early_log in "$SLURM_SUBMIT_DIR" "$HOME" "${TMPDIR:-/tmp}"; do
  early_log=$early_log/slurm-$SLURM_JOB_ID.out
  if { : >>"$early_log"; } 2>/dev/null; then
    exec >>"$early_log" 2>&1
    break
  fi
done

# sbatch runs a copy of this file: the checkout is where the original lies
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
for root in "${DIST_LM_ROOT:-}" "${script%/slurm/*}" "$SLURM_SUBMIT_DIR"; do
  [ -f "$root/slurm/common.sh" ] && break
done
if [ ! -f "$root/slurm/common.sh" ]; then
  echo "error: no checkout of dist_lm at $root; set DIST_LM_ROOT to it before sbatch" >&2
  exit 2
fi
# shellcheck source=SCRIPTDIR/common.sh
. "$root/slurm/common.sh"

run_job stage=rlhf model=large -- "$@"
