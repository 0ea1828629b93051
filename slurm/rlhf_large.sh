#!/usr/bin/env bash
# Train a reward model and align a large policy with it, on the nodes of a Slurm job.
#
#   sbatch [--nodes=N] [--gpus-per-node=G] [--time=T] slurm/rlhf_large.sh [key=value ...]
#
# Arguments go to `python -m dist_lm.launch`. Defaults: stage=rlhf model=large cluster.nodes=(nodes of the job)
# work_dir=work (below the directory of submission). After a failure the same command continues.
# PPO unless rlhf.algorithm says otherwise: `rlhf.algorithm=grpo rlhf.prompts=256` (docs/algorithms.md).
#
# slurm/common.sh lists the files of a job, its environment variables, and the failures that it survives. The options
# below are defaults: those on sbatch's command line win.
#SBATCH --job-name=dist_lm_rlhf
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
# an iteration that has begun is finished before the checkpoint, and takes longer than a training step
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=/dev/null
set -euo pipefail
: "${SLURM_JOB_ID:?this is a batch script: sbatch slurm/rlhf_large.sh}"
# sbatch runs a copy of this file: the path of the original leads to the checkout
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p') || true
for root in "${DIST_LM_ROOT:-}" "${script%/slurm/*}" "$SLURM_SUBMIT_DIR"; do
  if [ -f "$root/slurm/common.sh" ]; then
    # shellcheck source=SCRIPTDIR/common.sh
    . "$root/slurm/common.sh"
    run_job stage=rlhf model=large -- "$@"
  fi
done
echo "error: no checkout of dist_lm at $root; set DIST_LM_ROOT to it before sbatch" |
  tee -a "$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID.out" "$HOME/slurm-$SLURM_JOB_ID.out"
exit 2
