#!/usr/bin/env bash
# Serve trained models on the nodes of a Slurm job, under OpenAI's API (docs/serve.md).
#
#   sbatch [--nodes=N] [--gpus-per-node=G] [--time=T] slurm/serve.sh RUN [RUN ...] [OPTION ...]
#
# Arguments go to `dist-lm serve`. On several nodes engines are actors of a Ray of the job's own, one for each GPU
# (`--tp` GPUs), or one a node without GPUs; the server is on the first node (slurm/serve_nodes.sh).
# By default the server listens on its node's loopback address; from your machine:
#   ssh -L 8000:127.0.0.1:8000 NODE            (squeue --me shows the node)
# For other nodes: DIST_LM_API_KEY=SECRET sbatch slurm/serve.sh RUN --host 0.0.0.0
# Without a key, all users of the node can call the server, so the job takes whole nodes.
#
# The log is slurm-JOBID.out in the directory of submission. Before the time limit and at scancel, answers under way get
# `--stop-seconds`. slurm/common.sh lists the environment variables that choose venv, container and modules.
#SBATCH --job-name=dist_lm_serve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=/dev/null
set -euo pipefail
: "${SLURM_JOB_ID:?this is a batch script: sbatch slurm/serve.sh RUN}"
# sbatch runs a copy of this file: the path of the original leads to the checkout
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p') || true
for root in "${DIST_LM_ROOT:-}" "${script%/slurm/*}" "$SLURM_SUBMIT_DIR"; do
  if [ -f "$root/slurm/common.sh" ]; then
    # shellcheck source=SCRIPTDIR/common.sh
    . "$root/slurm/common.sh"
    open_early_log
    # shellcheck disable=SC2034 # used by load_environment: a container sees this folder
    work_dir=$SLURM_SUBMIT_DIR
    load_environment
    say "job $SLURM_JOB_ID on $SLURMD_NODENAME: dist-lm serve $*"
    # shellcheck source=SCRIPTDIR/serve_nodes.sh
    . "$root/slurm/serve_nodes.sh"
    if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then serve_over_nodes "$@"; fi
    # srun would take the TERM that is meant for the server, and kill it
    if [ "${#on_head[@]}" -gt 0 ]; then serve_in_container "$@"; fi
    exec python -m dist_lm serve "$@" </dev/null
  fi
done
echo "error: no checkout of dist_lm at $root; set DIST_LM_ROOT to it before sbatch" |
  tee -a "$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID.out" "$HOME/slurm-$SLURM_JOB_ID.out"
exit 2
