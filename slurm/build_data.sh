#!/usr/bin/env bash
# Build corpora of texts by tasks (docs/builds.md) on all nodes of a Slurm job.
#
#   sbatch [--nodes=N] [--time=T] slurm/build_data.sh corpus=NAME [key=value ...]
#
# Arguments go to `python -m dist_lm.launch`. Defaults: stage=shards corpus.build=tasks work_dir=work (below the directory
# of submission). Sources and work_dir must be on a file system that all nodes share. After a failure or a requeue the
# same command continues: tasks whose results are in work_dir/builds do not run again.
#
# slurm/common.sh lists the files of a job, its environment variables, and the failures that it survives. The options
# below are defaults: those on sbatch's command line win.
#SBATCH --job-name=dist_lm_data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
# no checkpoint is written: results of finished tasks are on disk
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=/dev/null
set -euo pipefail
: "${SLURM_JOB_ID:?this is a batch script: sbatch slurm/build_data.sh}"
# sbatch runs a copy of this file: the path of the original leads to the checkout
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p') || true
for root in "${DIST_LM_ROOT:-}" "${script%/slurm/*}" "$SLURM_SUBMIT_DIR"; do
  if [ -f "$root/slurm/common.sh" ]; then
    # shellcheck source=SCRIPTDIR/common.sh
    . "$root/slurm/common.sh"
    run_job stage=shards corpus.build=tasks -- "$@"
  fi
done
echo "error: no checkout of dist_lm at $root; set DIST_LM_ROOT to it before sbatch" |
  tee -a "$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID.out" "$HOME/slurm-$SLURM_JOB_ID.out"
exit 2
