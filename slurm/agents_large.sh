#!/usr/bin/env bash
# Train a large policy over many turns with an environment (docs/agents.md), on the nodes of a Slurm job.
#
#   sbatch [--nodes=N] [--gpus-per-node=G] [--time=T] slurm/agents_large.sh rlhf.environment=NAME \
#     rlhf.prompts_from=TASKS [key=value ...]
#
# Arguments go to `python -m dist_lm.launch`. Defaults: stage=rlhf model=large rlhf.algorithm=grpo
# rlhf.reward_model=none rlhf.environments_at_once=256 cluster.nodes=(nodes of the job) work_dir=work (below the
# directory of submission). Files of the environment and of tasks must be on a file system that all nodes share. After a
# failure the same command continues; conversations that have ended are not held again.
#
# slurm/common.sh lists the files of a job, its environment variables, and the failures that it survives. The options
# below are defaults: those on sbatch's command line win.
#SBATCH --job-name=dist_lm_agents
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
# an iteration that has begun is finished before the checkpoint, and conversations wait for their environment
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=/dev/null
set -euo pipefail
: "${SLURM_JOB_ID:?this is a batch script: sbatch slurm/agents_large.sh}"
# sbatch runs a copy of this file: the path of the original leads to the checkout
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p') || true
for root in "${DIST_LM_ROOT:-}" "${script%/slurm/*}" "$SLURM_SUBMIT_DIR"; do
  if [ -f "$root/slurm/common.sh" ]; then
    # shellcheck source=SCRIPTDIR/common.sh
    . "$root/slurm/common.sh"
    run_job stage=rlhf model=large rlhf.algorithm=grpo rlhf.reward_model=none rlhf.environments_at_once=256 -- "$@"
  fi
done
echo "error: no checkout of dist_lm at $root; set DIST_LM_ROOT to it before sbatch" |
  tee -a "$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID.out" "$HOME/slurm-$SLURM_JOB_ID.out"
exit 2
